"""The doctor's --launch: a command or a script is read, nothing is started, and wrong lines have their way out."""

import json
import shlex
import socket
import subprocess
import time
from pathlib import Path

import pytest

from mindspeed_cp.arguments.launch import misspelt, read_flags
from mindspeed_cp.doctor import environment, launch, launch_findings, quoting
from mindspeed_cp.megatron import flag_checks

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only
MODEL = "--num-attention-heads 16 --hidden-size 1024 --num-layers 8 --seq-length 4096"


@pytest.fixture(autouse=True)
def megatron_is_not_asked(monkeypatch):
    def ask(module, *flags, environment=None):
        return json.loads(json.dumps(flag_checks.wrong_flags(flags) if module.endswith("checks") else None))

    monkeypatch.setattr(launch_findings, "ask", ask)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import os\nimport mindspeed_cp.megatron_adaptor\nfrom megatron.core import parallel_state\n")
    return path


def said(script, flags, launcher="torchrun --standalone --nproc-per-node 8"):
    return launch_findings.examined(f"{launcher} {shlex.quote(str(script))} {MODEL} {flags}", "cpu")[0]


def texts(findings, level):
    return [finding.text for finding in findings if finding.level == level]


@pytest.mark.parametrize(
    "command, world, port, runner",
    [
        ("torchrun --nproc-per-node 8 t.py --a 1", 8, 29500, False),
        ("torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 t.py --a 1", 16, None, False),
        ("A=b env C=d torchrun --nproc_per_node=4 --master_port=1234 -m mindspeed_cp.run t.py --a 1", 4, 1234, True),
        ("/opt/bin/python3.11 -u -m torch.distributed.run --standalone t.py --a 1", 1, None, False),
        ("python t.py --a 1", 1, None, False),
        ("python -X dev -u -W ignore t.py --a 1", 1, None, False),
        ("python -m mindspeed_cp.run t.py --a 1", 1, None, True),
        ("srun --ntasks 8 python -u t.py --a 1", 0, None, False),
        ("torchrun --nproc-per-node gpu t.py --a 1", 0, 29500, False),
    ],
)
def test_a_command_is_read_without_being_started(command, world, port, runner):
    found = launch.read(command, {})
    assert (found.script, found.flags) == ("t.py", ("--a", "1"))
    assert (found.world_size, found.port, found.runner) == (world, port, runner)
    assert found.environment == ({"A": "b", "C": "d"} if "A=b" in command else {})


@pytest.mark.parametrize(
    "command, message",
    [
        ("", "names no command"),
        ("torchrun 'x", "close the quotes"),
        ("make train", "starts neither torchrun nor python"),
        ("torchrun --nproc-per-node 2 --no-such t.py", "torchrun"),
        ("torchrun -m mindspeed_cp.run", "names no training script"),
        ("bash nowhere.sh", "nowhere.sh does not exist"),
    ],
)
def test_a_command_that_cannot_be_read_says_what_to_give(command, message):
    (found, *_), _ = launch_findings.examined(command, "cpu")
    assert found.level == "problem" and message in f"{found.text}; {found.todo}"


def test_a_script_that_does_not_know_dry_runs_is_not_started(tmp_path):
    script = tmp_path / "train.sh"
    for text in ("", "# with DRY_RUN=1 it prints\n", "echo DRY_RUN\n", f"echo {launch.MARKER}\n"):
        script.write_text(f"{text}touch {tmp_path}/started\n")
        for command in (f"bash {script} 7b", str(script)):
            (found,), _ = launch_findings.examined(command, "cpu")
            assert (
                found.level == "problem" and "that DRY_RUN=1 starts nothing" in found.text and "--launch" in found.todo
            )
    assert not (tmp_path / "started").exists()


def test_what_a_script_started_ends_with_the_time_limit(tmp_path, monkeypatch):
    script = tmp_path / "train.sh"
    script.write_text(f"{launch.MARKER}\nsleep 300 &\necho $! > {tmp_path}/pid\nwait\n")
    monkeypatch.setattr(launch, "TIMEOUT", 1)
    (found,), _ = launch_findings.examined(f"bash {script}", "cpu")
    assert "took more than 1 s" in found.text
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} is alive")


QUOTED = [
    r"a\ b 'c d' \"e $F \\ \x\" g''h",
    r"--x $'it\'s\ta\x41\u00e9\101\n' $'a'b",
    "a\\\nb 'c\nd' \"\"",
    "KEY=$'a b' torchrun",
]


@pytest.mark.parametrize("line", QUOTED)
def test_words_are_those_of_bash(line):
    printed = subprocess.run(
        ["bash", "-c", f"F='$F'; printf '%s\\0' {line}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert quoting.words(line) == printed.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("line", ["a 'b", 'a "b', "$'a", "a\\"])
def test_a_quote_that_is_not_closed_is_an_error(line):
    with pytest.raises(ValueError):
        quoting.words(line)


def test_flags_that_the_script_does_not_know_are_named(monkeypatch):
    from mindspeed_cp.doctor import installed

    monkeypatch.setattr(launch_findings, "ask", installed.ask)
    trainer = ROOT / "scripts" / "pretrain_gpt.py"
    found = said(trainer, "--context-parallel-size 4 --use-flash-attn --use-mcore-models --cp-windowsize 2")
    (wrong,) = [finding for finding in found if finding.level == "problem"]
    assert wrong.text == "pretrain_gpt.py does not know --use-mcore-models"


@pytest.mark.parametrize("where", ["MASTER_PORT=99999 MASTER_ADDR=node0", "MASTER_PORT=70000"])
def test_a_port_beyond_all_ports_is_a_problem(where):
    own = dict(part.split("=") for part in where.split())
    (wrong,) = [finding for finding in environment.meeting({}, own) if finding.level == "problem"]
    assert f"port {own['MASTER_PORT']} is not one of 1 to 65535" in wrong.text and "MASTER_PORT=" in wrong.todo


def test_a_launch_script_is_read_by_its_dry_run(monkeypatch, tmp_path):

    python = tmp_path / "python"  # describe.py has tests of its own, and costs seconds
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    flags = f"PYTHON={python} DEVICE=npu NNODES=2 MASTER_ADDR=127.0.0.1 SEQ_LENGTH=128k"
    found, own = launch_findings.examined(f"{flags} bash {ROOT}/scripts/launch/llama2.sh 7b", "cpu")
    assert texts(found, "ok")[1] == (
        "Hybrid (ulysses 4, ring 2), cp=8, zigzag, causal; ulysses 4 x window 2 x windows 1; 16,384 tokens on a rank"
    )
    assert "imports the adaptor" in texts(found, "ok")[0]
    started = launch.read(f"{flags} bash {ROOT}/scripts/launch/llama2.sh 7b", {"PATH": "/usr/bin:/bin"})
    assert started.world_size == 16 and started.environment["TASK_QUEUE_ENABLE"] == own["TASK_QUEUE_ENABLE"] == "2"
    (refused,), _ = launch_findings.examined(f"SEQ_LENGTH=64x bash {ROOT}/scripts/launch/llama2.sh 7b", "cpu")
    assert refused.text.startswith("SEQ_LENGTH 64x must be a number") and refused.todo


def test_the_resolved_configuration_its_bytes_and_its_memory_are_shown(script):
    found = said(script, "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --bf16 --use-flash-attn")
    assert {finding.level for finding in found} == {"ok"}
    _, setting, sent, kept = texts(found, "ok")
    assert setting.startswith("Ring, cp=4, zigzag, causal; ") and "1,024 tokens" in setting
    one = 1024 * 16 * 64 * 2 * 2  # a rank's keys and values in bfloat16
    assert f"{3 * one / 1e6:,.1f} MB forward" in sent
    # query, key, value and out in bfloat16, and the statistics in float32
    assert f"{(2 * one + 1024 * 16 * 4) / 1e6:,.1f} MB a layer" in kept and "8 layers" in kept


def test_latent_attention_sends_the_latent_or_keys_wider_than_values_for_every_head(script):
    latent = "--multi-latent-attention --qk-head-dim 48 --qk-pos-emb-head-dim 16 --v-head-dim 32 --kv-lora-rank 128"
    flags = f"--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --use-flash-attn --bf16 {latent}"
    assert f"{3 * 1024 * (16 + 128) * 2 / 1e3:,.1f} kB forward" in texts(said(script, flags), "ok")[2]
    heads = texts(said(script, f"{flags} --cp-mla-exchange heads"), "ok")[2]
    assert f"{3 * 1024 * 16 * (64 + 32) * 2 / 1e6:,.1f} MB forward" in heads


def test_fallbacks_are_notes_and_ignored_flags_are_warnings(script):
    found = said(
        script,
        "--context-parallel-size 4 --cp-window-size 2 --gather-size-calculator dynamic "
        "--context-parallel-kv-cache-policy full",
    )
    assert any("falling back to aligned Ulysses" in text for text in texts(found, "note"))
    (warning,) = [finding for finding in found if finding.level == "warning"]
    assert "--cp-window-size 2 is ignored" in warning.text and warning.todo == "leave out --cp-window-size"


@pytest.mark.parametrize(
    "flags, text, todo",
    [
        (
            "--context-parallel-size 4 --num-attention-heads 6",
            "--num-attention-heads 6 must be divisible",
            "--context-parallel-algo",
        ),
        (
            "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --num-attention-heads 9",
            "--ulysses-degree-in-cp is not given",
            "choose 2",
        ),
        ("--context-parallel-size four", "--context-parallel-size four must be a whole number", "try"),
        ("--context-parallel-size 16", "world size 8 must be", "start 16 processes"),
        ("--context-parallel-size 4 --cp-kernel npu", "--cp-kernel npu serves npu tensors", "leave --cp-kernel out"),
        ("--context-parallel-size 2 --num-attention-heads 0", "--num-attention-heads 0 must be at least 1", "give 1"),
        ("--context-parallel-size 2 --tensor-model-parallel-size 0", "parallel-size 0 must be at least 1", "give 1"),
        ("--context-parallel-size 2 --num-layers x", "argument --num-layers", "docs/flags.md"),
    ],
)
def test_a_wrong_line_has_the_rule_and_the_way_out_of_the_configuration(script, flags, text, todo):
    wrong = [finding for finding in said(script, flags) if finding.level == "problem"]
    assert len(wrong) == 1 and text in wrong[0].text and todo in wrong[0].todo, wrong


def test_layers_of_their_own_are_counted_and_each_kind_says_what_it_sends(script):
    found = said(
        script,
        "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --num-layers 6 "
        "--cp-layer-algo 0-/4:ulysses_cp_algo",
    )
    sent = [text for text in texts(found, "ok") if " sends " in text]
    assert [text.partition(" sends ")[0] for text in sent] == [
        "each of 2 layers by Ulysses", "each of 4 layers by Ring",
    ]  # fmt: skip
    (wrong,) = [
        finding
        for finding in said(script, "--context-parallel-size 4 --num-layers 6 --cp-layer-algo 6:megatron_cp_algo")
        if finding.level == "problem"
    ]
    assert "names layer 6, and --num-layers is 6" in wrong.text


def test_the_degree_that_hybrid_would_get_fits_a_node_of_the_launch(script, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    flags = "--context-parallel-size 8 --context-parallel-algo hybrid_cp_algo --use-flash-attn"
    for per_node, degree in ((8, 4), (2, 2)):
        found = said(
            script, flags, f"torchrun --nnodes {16 // per_node} --nproc-per-node {per_node} --master-port 29731"
        )
        (notice,) = texts(found, "note")
        assert f"{degree} is the largest divisor" in notice and f"the {per_node} ranks of a node" in notice


def test_context_parallelism_that_is_off_is_said(script):
    (warning,) = [finding for finding in said(script, "") if finding.level == "warning"]
    assert "is off" in warning.text and warning.todo.startswith("add --context-parallel-size")


def test_a_misspelt_flag_is_named_with_the_right_one():
    rest = ["--context_parallel_size", "4", "--cp-windowsize=2", "--train-iters", "5", "--context-parallel"]
    assert misspelt(rest) == {
        "--context_parallel_size": "--context-parallel-size",
        "--cp-windowsize": "--cp-window-size",
    }
    assert read_flags(rest)[1] == rest


def test_a_script_without_the_adaptor_or_with_it_behind_megatron_is_a_problem(script):
    flags = "--context-parallel-size 4 --use-flash-attn"
    script.write_text("from megatron.training import pretrain\nimport mindspeed_cp.megatron_adaptor\n")
    (found,) = [finding for finding in said(script, flags) if finding.level == "problem"]
    assert "imports Megatron in line 1, before the adaptor in line 2" in found.text
    script.write_text("import megatron.core\n")
    (found,) = [finding for finding in said(script, flags) if finding.level == "problem"]
    assert "nothing is patched" in found.text and "-m mindspeed_cp.run" in found.todo
    script.write_text("if [ -f x ]; then\n")
    assert "is no Python" in texts(said(script, flags), "problem")[0]
    runner = "torchrun --standalone --nproc-per-node 4 -m mindspeed_cp.run"
    assert not [finding for finding in said(script, flags, runner) if finding.level == "problem"]
    (found,) = [finding for finding in said(script.with_name("no.py"), flags) if finding.level == "problem"]
    assert "does not exist" in found.text


def test_what_the_patches_refuse_of_megatrons_flags_is_said(script):
    megatron = script.rename(script.with_name("pretrain_gpt.py"))
    runner = "torchrun --standalone --nproc-per-node 8 -m mindspeed_cp.run"
    flags = "--context-parallel-size 4 --use-flash-attn"
    (found,) = [finding for finding in said(megatron, flags, runner) if finding.level == "problem"]
    assert "needs Transformer Engine" in found.text and found.todo.startswith("use --transformer-impl local")
    assert not texts(said(megatron, f"{flags} --transformer-impl local", runner), "problem")
    legacy = said(megatron, f"{flags} --use-legacy-models --ckpt-format torch_dist", runner)
    assert "--use-legacy-models" in texts(legacy, "problem")[0]


def test_the_port_of_the_launch_is_tried(script):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        number = other.getsockname()[1]
        launcher = f"torchrun --nproc-per-node 4 --master-port {number}"
        found = said(script, "--context-parallel-size 4 --use-flash-attn", launcher)
    (wrong,) = [finding for finding in found if finding.level == "problem"]
    assert f"port {number} is in use" in wrong.text
    assert wrong.todo.startswith("torchrun --master-port ")


def test_the_documented_launch_says_what_the_page_says(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    command = page.split('--launch "')[1].split('"')[0]
    shown = page.split("```text\nLaunch\n")[1].split("```")[0].splitlines()[:-2]
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt.py").touch()
    lines = [line for finding in launch_findings.examined(command, "cpu")[0] for line in finding.lines(110)]
    assert [line.split() for line in lines] == [line.split() for line in shown]
