"""The unchanged pretrain_gpt.py of a Megatron-LM checkout; runs whenever MEGATRON_LM_PATH points at one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")
ALGORITHM_FLAGS = (
    "--context-parallel-size",
    "--context-parallel-algo",
    "--cp-attention-mask-type",
    "--cp-window-size",
    "--use-cp-send-recv-overlap",
    "--ulysses-degree-in-cp",
    "--context-parallel-kv-cache-policy",
    "--context-parallel-cache-interval",
    "--gather-size-calculator",
    "--use-ulysses-allgather-kv",
    "--cp-kv-exchange",
)

needs_checkout = pytest.mark.skipif(
    not Path(CHECKOUT, "pretrain_gpt.py").is_file(),
    reason="no Megatron-LM checkout: set MEGATRON_LM_PATH to one (git clone --branch core_v0.16.1, repository "
    "NVIDIA/Megatron-LM)",
)
pytestmark = pytest.mark.cpu_only


def run(command, **environment):
    path = os.pathsep.join([CHECKOUT, str(REPOSITORY)])
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=580,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "MINDSPEED_CP_DEVICE": "cpu",
            "PYTHON": sys.executable,
            **environment,
        },
    )


def script(*flags):
    return run(
        [sys.executable, "-W", "ignore", "-m", "mindspeed_cp.run", str(Path(CHECKOUT, "pretrain_gpt.py")), *flags]
    )


@needs_checkout
def test_training_equals_context_parallel_size_1():
    result = run(["bash", "scripts/test_megatron_lm.sh", CHECKOUT, "--quick"])
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "bitwise equal" in result.stdout and "FAILED" not in result.stdout


@needs_checkout
def test_help_shows_every_flag_in_one_group():
    result = script("--help")
    assert result.returncode == 0
    group = result.stdout.split("context parallelism (mindspeed_cp):")[1]
    missing = [flag for flag in ALGORITHM_FLAGS[1:] if flag not in group]
    assert not missing
    assert "--context-parallel-size" in result.stdout  # Megatron's own, never added a second time


@needs_checkout
@pytest.mark.parametrize(
    "flags, words",
    [
        (("--context-parallel-algo", "ring"), ("--context-parallel-algo ring", "megatron_cp_algo")),
        (("--cp-window-size", "0"), ("--cp-window-size 0", "at least 1")),
        (
            (
                "--context-parallel-size",
                "4",
                "--context-parallel-algo",
                "hybrid_cp_algo",
                "--ulysses-degree-in-cp",
                "3",
            ),
            ("--ulysses-degree-in-cp 3", "choose 2"),
        ),
    ],
    ids=["choice", "number", "rule"],
)
def test_wrong_value_exits_with_status_2_and_one_line(flags, words):
    result = script(
        *"--num-layers 2 --hidden-size 32 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
        "--micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --train-iters 1".split(),
        *flags,
    )
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.stderr[-2000:]
    assert "Traceback" not in result.stderr
