"""scripts/verify_npu.sh: its checks, the one file that it writes, and a run that fails costs its own row alone."""

import os
import re
import subprocess
import sys
from math import inf
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import verify_npu
import verify_runs
from trainer_runs import REPOSITORY, environment
from verify_ranks import RunFailed, last_words, torchrun
from verify_report import Outcome, report
from verify_speed import Shape, rows, shape_for

pytestmark = pytest.mark.cpu_only
QUICK = [
    "device and kernel",
    "operators, every block shape",
    "parity of every algorithm",
    "training, Ulysses and Ring",
    "performance, Ulysses and Ring",
]


def verify(*flags):
    return subprocess.run(
        ["bash", str(REPOSITORY / "scripts/verify_npu.sh"), *flags],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHON": sys.executable},
        timeout=120,
    )


def test_the_quick_checks_come_first_and_each_command_names_files_that_exist():
    listed = [line.partition(": ") for line in verify("--list").stdout.splitlines()]
    assert [name for name, _, _ in listed][: len(QUICK)] == QUICK
    assert [name for name, _, _ in listed][len(QUICK) :] == [
        "kernel choice",
        "parity over all features",
        "launch scripts, dry run",
        "training, cp=1 with and without --use-flash-attn",
        "training, every algorithm",
        "training, KV cache policies",
        "training, sequence parallel, distributed optimizer, recompute, bf16",
        "training, packed documents, unaligned",
        "checkpoint and resume",
        "performance",
    ]
    assert [line.split(":")[0] for line in verify("--list", "--quick").stdout.splitlines()] == QUICK
    files = [word for _, _, command in listed for word in command.split() if word.startswith(("tests/", "scripts/"))]
    assert all(list(REPOSITORY.glob(word.rstrip(";"))) for word in files), files


def test_an_unknown_flag_is_refused():
    result = verify("--devise", "npu")
    assert result.returncode == 2 and "--devise" in result.stderr


def test_only_runs_the_checks_that_it_names_beside_the_machines():
    args = verify_npu.parse(["--only", "KV cache", "--only", "resume"])
    assert [check.name for check in args.checks] == [
        "device and kernel",
        "training, KV cache policies",
        "checkpoint and resume",
    ]
    with pytest.raises(SystemExit):
        verify_npu.parse(["--quick", "--only", "resume"])


def test_megatrons_own_script_is_a_check_where_its_checkout_is_named(monkeypatch):
    args = verify_npu.parse([])
    monkeypatch.setenv("MEGATRON_LM_PATH", "/checkout")
    assert verify_npu.checks(args)[-1] is verify_npu.MEGATRON
    monkeypatch.delenv("MEGATRON_LM_PATH")
    assert verify_npu.MEGATRON not in verify_npu.checks(args)


def test_mindspeeds_ring_is_a_check_on_npus_where_mindspeed_is_installed(monkeypatch):
    monkeypatch.setattr(verify_npu, "find_spec", lambda name: name)
    assert verify_npu.MINDSPEED in verify_npu.parse([]).checks
    assert verify_npu.MINDSPEED not in verify_npu.parse(["--device", "cuda"]).checks
    monkeypatch.setattr(verify_npu, "find_spec", lambda name: None)
    assert verify_npu.MINDSPEED not in verify_npu.parse([]).checks


def test_a_check_that_fails_or_does_not_end_is_a_failure_with_its_output(tmp_path):
    check = verify_npu.Check("a", "")
    passed = verify_npu.run(check, "echo said", tmp_path / "1.log")
    assert passed.passed and passed.said == "said\n"
    assert not verify_npu.run(check, "echo no; exit 3", tmp_path / "2.log").passed
    hung = verify_npu.run(check._replace(minutes=0.01), "echo before; sleep 60", tmp_path / "3.log")
    assert not hung.passed and "before" in hung.said and "ended after 0.01 minutes" in hung.said


def test_what_a_check_has_started_ends_with_it(tmp_path):
    """Ranks that torchrun and the proof start are sessions of their own, and would keep their devices."""
    command = f"setsid sh -c 'echo $$ > {tmp_path}/pid; sleep 60' & wait"
    hung = verify_npu.run(verify_npu.Check("a", ""), command, tmp_path / "log", minutes=0.02)
    assert not hung.passed and not processes.runs(int((tmp_path / "pid").read_text()))


def test_the_report_holds_machine_table_measurements_and_whole_failures():
    lines = [f"line {number}" for number in range(200)]
    told = ["ring: failed, it ended", "ulysses: equal, output 1e-7", "kv all-gather: DIFFERENT, output 1", "a|b"]
    outcomes = [
        Outcome("device and kernel", "look", True, 1, "versions: torch 2\nHCCL_BUFFSIZE=200\nkernel npu\n"),
        Outcome("training, every algorithm", "train", False, 61, "\n".join([*lines, *told])),
        Outcome(
            "performance",
            "speed",
            True,
            2,
            "a warning\n4 layers of 64, 256 tokens, for 1 GiB\n\n| algorithm |\n|---|\n| ring |\nmeasured\n",
        ),
    ]
    text = report("npu", 8, "whole", outcomes)
    assert text.startswith("# mindspeed_cp on npu: 1 failed\n")
    assert "HCCL_BUFFSIZE=200" in text and "| device and kernel | pass | 1 s | kernel npu |" in text
    assert "| training, every algorithm | **FAIL** | 61 s | a/b |" in text
    assert "\n4 layers of 64, 256 tokens, for 1 GiB\n" in text
    assert "\n".join(f"* {line}" for line in told[:3]) in text and "| algorithm |\n|---|\n| ring |" in text
    failure = text[text.index("## Failed: training, every algorithm") :]
    assert "$ train" in failure and "line 199" in failure and "line 60" in failure and "line 10\n" not in failure
    assert report("npu", 8, "--quick", outcomes[:1]).startswith("# mindspeed_cp on npu: pass\n")


STAND_IN = """#!/bin/bash
echo "$@" >> {log}
case "$*" in
  *verify_machine*) echo "versions: torch 2"; echo "devices: 2 x stand-in, 80.00 GiB free"; echo "kernel $3" ;;
  *policies*) printf 'ring, KV cache full: failed, it ended with status 1\\n---- first traceback, rank 1\\nKeyError\\n'
    exit {status} ;;
  *performance*) printf '4 layers of 64, 256 tokens, for 80 GiB free\\n\\n| algorithm |\\n|---|\\n| ring |\\n' ;;
  *) echo "3 passed" ;;
esac
"""


def verified(folder, monkeypatch, *flags, status=0):
    """(exit status, report, commands) of the harness, whose programs a stand-in for Python plays."""
    log, python, written = folder / "log", folder / "python", folder / "report.md"
    python.write_text(STAND_IN.format(log=log, status=status))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = verify_npu.main([*flags, "--report", str(written)])
    return found, written.read_text(), log.read_text().splitlines()


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_every_check_runs_on_the_device_and_one_that_fails_costs_its_own_row(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANKS", "2")
    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    status, text, commands = verified(tmp_path, monkeypatch, "--device", device, status=1)
    results = re.findall(r"^\| (.*) \| (pass|\*\*FAIL\*\*) \| \d+ s \|", text, re.M)
    assert [name for name, _ in results] == [check.name for check in verify_npu.CHECKS]
    assert [name for name, result in results if result != "pass"] == ["training, KV cache policies"]
    assert status == 1 and "14 of 15 checks passed" in capsys.readouterr().out
    assert text.startswith(f"# mindspeed_cp on {device}: 1 failed\n") and "devices: 2 x stand-in" in text
    assert "KeyError" in text[text.index("## Failed: training, KV cache policies") :]
    assert all(f"--device {device}" in line for line in commands if "-m pytest" in line or "verify_runs" in line)
    assert all("--ranks 2" in line for line in commands if "verify_runs" in line)
    (operators,) = [
        line for line in commands if "tests/kernels/test_kernel_" in line and "test_kernel_parity" not in line
    ][:1]
    assert f"test_kernel_{device}.py" in operators
    again = verified(tmp_path, monkeypatch, "--device", device, "--only", "policies")
    assert again[0] == 0 and "| training, KV cache policies | pass |" in again[1] and "--only 'policies'" in again[1]


def test_without_the_device_each_row_says_so(tmp_path, monkeypatch, capsys):
    import torch
    import verify_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["verify_runs", "--device", "cuda", "policies", str(tmp_path)])
    with pytest.raises(SystemExit, match="--device cuda: torch finds no such device"):
        verify_runs.main()
    monkeypatch.setattr(sys, "argv", ["verify_machine", "cuda"])
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        verify_machine.main()
    assert "devices: none" in capsys.readouterr().out


def test_trainings_and_speed_run_on_stand_ins_for_cuda_devices(tmp_path, request):
    """The proofs and trainings behind the rows, in processes of their own as on devices."""
    if not request.config.getoption("--full"):
        pytest.skip("a longer run: --full")
    place = REPOSITORY / "tests/helpers/stand_in_devices"
    own = {**environment(), "PYTHON": sys.executable, "RANKS": "2"}
    own["PYTHONPATH"] = os.pathsep.join([str(place), own.get("PYTHONPATH", "")])
    flags = ["--device", "cuda", "--only", "Ulysses and Ring", "--report", str(tmp_path / "report.md")]
    run = subprocess.run(
        ["bash", REPOSITORY / "scripts/verify_npu.sh", *flags], capture_output=True, text=True, env=own
    )
    text = (tmp_path / "report.md").read_text()
    assert run.returncode == 0 and "3 of 3 checks passed" in run.stdout, text
    assert "devices: 2 x stand-in, 0.03 GiB free" in text and "4 layers of 128, 256 tokens, for 0.03 GiB free" in text
    assert len(re.findall(r"^\* (ulysses|ring): equal, output", text, re.M)) == 2
    rows = re.findall(r"^\| (data parallelism|ulysses|ring) \| \d+ \|", text, re.M)
    assert rows == ["data parallelism", "ulysses", "ring"]


FAILING = """
import os, pathlib, time
print("rank", os.environ["RANK"], "began", flush=True)
began = pathlib.Path(__file__).with_name("began")
if os.environ["RANK"] == "0":
    began.touch()
else:
    while not began.exists():
        time.sleep(0.01)
    raise KeyError("what went wrong")
time.sleep(60)  # until torchrun ends it
"""


def test_ranks_that_fail_are_heard_each_with_the_first_traceback(tmp_path):
    (script := tmp_path / "train.py").write_text(FAILING)
    with pytest.raises(
        RunFailed, match="(?s)first traceback, rank 1.*KeyError: 'what went wrong'.*rank 0, last"
    ) as seen:
        torchrun(tmp_path / "ranks", 2, [script], [])
    assert "rank 0 began" in str(seen.value) and "rank 1 began" in str(seen.value)
    (tmp_path / "good.py").write_text('import os\nprint("rank", os.environ["RANK"])\n')
    assert torchrun(tmp_path / "good", 2, [tmp_path / "good.py"], []) == "rank 0\nrank 1\n"


def test_a_traceback_about_a_lost_peer_is_not_the_first(tmp_path):
    for rank, error in enumerate(("RuntimeError: Connection closed by peer", "ValueError: the cause")):
        (folder := tmp_path / str(rank)).mkdir()
        (folder / "stdout.log").write_text("")
        (folder / "stderr.log").write_text(f"Traceback (most recent call last):\n  File x\n{error}\nmore\n")
    lines = list(last_words(tmp_path))
    assert lines[:4] == [
        "---- first traceback, rank 1",
        "Traceback (most recent call last):",
        "  File x",
        "ValueError: the cause",
    ]


def test_sizes_follow_the_free_memory():
    assert shape_for(60 << 30) == Shape(4096, 32768)
    assert shape_for(32 << 20) == Shape(128, 256)
    for free in (1 << 25, 1 << 30, 8 << 30, 29 << 30, 60 << 30, 200 << 30):
        shape = shape_for(free)
        assert shape.num_bytes <= free and shape.hidden % shape.heads == 0
    assert shape_for(1) == Shape(64, 256)
    assert (
        verify_runs.measured_shape("npu", 32 << 20) == shape_for(32 << 20) != verify_runs.measured_shape("cpu", 1 << 40)
    )


def test_a_run_that_fails_costs_its_own_row():
    def train(name):
        if name == "ring":
            raise RunFailed("it ended with status 1")
        record = dict(seconds=2.0 if name == "ulysses" else 1.0, cp_bytes_per_rank=8, peak_memory_bytes=1 << 30)
        return [dict(record, seconds=99.0)] * 3 + [record] * 5

    found = list(rows(Shape(64, 256), 2, ("data parallelism", "ring", "ulysses"), train, RunFailed))
    assert [failure for _, failure in found] == ["", "ring: it ended with status 1", ""]
    assert found[1][0].startswith("| ring | failed |")
    assert "| 2000 |" in found[2][0] and "+100.0%" in found[2][0] and "| 1.00 |" in found[2][0]


@pytest.mark.parametrize(
    ("changes", "share", "said"),
    [
        ({"largest_error": {"output": 1e-5, "gradient": None, "loss": 0.0}}, 0.2, "ring: equal, output 1.0e-05"),
        (
            {"equal": False, "first_module": {"name": "rope", "signature": "ends", "seen": "few"}},
            inf,
            "rope: ends, few",
        ),
        ({"failure": "rank 1 ended"}, inf, "ring: failed, rank 1 ended"),
    ],
)
def test_a_row_of_training_is_a_proof(monkeypatch, capsys, changes, share, said):
    whole = {"equal": True, "failure": "", "first_module": None, "first_parameter": None, "largest_error": {}}
    whole |= {"limits": {"output": 5e-5, "gradient": 2e-4, "loss": 1e-5}}
    plans = []
    monkeypatch.setattr(verify_runs.command.machine, "num_devices", lambda device: 8)
    monkeypatch.setattr(verify_runs.command, "proved", lambda plan, server: plans.append(plan))
    monkeypatch.setattr(verify_runs.report, "as_json", lambda verdict: whole | changes)
    args = SimpleNamespace(folder=Path("f"), ranks=8, device="npu", quick=True, tiny=False)
    run = verify_runs.Run("ring", "--context-parallel-algo megatron_cp_algo", "--sequence-parallel", tp=2)
    assert verify_runs.proof(args, run, None) == pytest.approx(share)
    assert said in capsys.readouterr().out
    (plan,) = plans
    assert (plan.ranks.cp, plan.ranks.tp, plan.shared.world, plan.shared.device) == (4, 2, 8, "npu")
    assert plan.wish.real_sizes and plan.wish.dtype == "float32" and "--sequence-parallel" in plan.alone.flags
    monkeypatch.setattr(verify_runs.command.machine, "num_devices", lambda device: 4)
    assert verify_runs.proof(args, run, None) == inf and "needs a device for each" in capsys.readouterr().out


def test_proofs_share_their_run_without_context_parallelism(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(verify_runs.Server, "__init__", lambda self, *place: None)
    monkeypatch.setattr(verify_runs.Server, "run", lambda self, run, tell: runs.append(run) or [run.flags])
    args = SimpleNamespace(folder=tmp_path, ranks=2, device="cpu", quick=True, tiny=True)
    server = verify_runs.SharingServer(tmp_path, "cpu")
    monkeypatch.setattr(verify_runs.command, "compare", lambda alone, shared, limits: None)
    monkeypatch.setattr(verify_runs.report, "as_json", lambda verdict: {"failure": "not compared"})
    for run in verify_runs.RUNS["algorithms"][:2] + verify_runs.RUNS["batches"][:2]:
        verify_runs.proof(args, run, server)
    assert [run.name for run in runs] == ["cp=1", "cp=2", "cp=2", "cp=1", "cp=2", "cp=2"]


def test_what_a_proof_leaves_out_is_trained():
    by_training = [run.name for run in verify_runs.RUNS["modes"] if not verify_runs.is_proved(run, "modes")]
    assert by_training == ["distributed optimizer and recompute"]
    assert not verify_runs.is_proved(verify_runs.RUNS["alone"][0], "alone")


def test_nothing_else_of_the_environment_is_shown(monkeypatch):
    import verify_machine

    monkeypatch.setitem(os.environ, "SECRET_TOKEN", "x")
    monkeypatch.setitem(os.environ, "HCCL_BUFFSIZE", "400")
    shown = list(verify_machine.environment())
    assert "HCCL_BUFFSIZE=400" in shown and not any("SECRET" in line for line in shown)
