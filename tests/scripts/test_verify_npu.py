"""scripts/verify_npu.sh: its checks, the one file that it writes, and a run that fails costs its own row alone."""

import json
import os
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


FAILING = """
import os, sys
print("rank", os.environ["RANK"], "began", flush=True)
if os.environ["RANK"] == "1":
    raise KeyError("what went wrong")
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
    ("stdout", "share", "said"),
    [
        ({"largest_error": {"output": 1e-5, "gradient": None, "loss": 0.0}}, 0.2, "ring: equal, output 1.0e-05"),
        (
            {"equal": False, "first_module": {"name": "rope", "signature": "ends", "seen": "few"}},
            inf,
            "rope: ends, few",
        ),
        ({"failure": "rank 1 ended"}, inf, "ring: failed, rank 1 ended"),
        (None, inf, "ring: failed, no such file"),
    ],
)
def test_a_row_of_training_is_a_proof(monkeypatch, capsys, stdout, share, said):
    whole = {"equal": True, "failure": "", "first_module": None, "first_parameter": None, "largest_error": {}}
    whole |= {"limits": {"output": 5e-5, "gradient": 2e-4, "loss": 1e-5}}
    printed = "" if stdout is None else "Warning: ASCEND_HOME_PATH is not set.\n" + json.dumps(whole | stdout)
    done = SimpleNamespace(stdout=printed, stderr="no such file")
    commands = []
    monkeypatch.setattr(verify_runs.subprocess, "run", lambda command, **options: commands.append(command) or done)
    args = SimpleNamespace(folder=Path("f"), ranks=8, device="npu", quick=True, tiny=False)
    run = verify_runs.Run("ring", "--context-parallel-algo megatron_cp_algo", "--sequence-parallel", tp=2)
    assert verify_runs.proof(args, run) == pytest.approx(share)
    assert said in capsys.readouterr().out
    line = " ".join(commands[0])
    assert "--real-sizes --device npu --dtype float32 --ranks 8 --cp 4" in line and "--sequence-parallel" in line


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
