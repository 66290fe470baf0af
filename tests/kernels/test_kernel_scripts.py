"""bench_kernels.py and verify_npu.sh run where there is no accelerator, and say what they would do."""

import subprocess
import sys

import bench_kernels
import pytest
from trainer_runs import REPOSITORY, environment

from mindspeed_cp.kernels import select_kernel

pytestmark = pytest.mark.cpu_only


def test_bench_kernels_prints_a_row_for_each_length(capsys):
    bench_kernels.main("--device cpu --lengths 64 128 --ranks 2 --heads 2 --repeat 1".split())
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["S", "64", "128"]
    assert all(len(row) == 7 for row in rows) and float(rows[1][5]) > 0


def test_bench_kernels_times_the_blocks_of_one_rank_of_a_ring():
    """Sixteenths of the causal triangle: 8 ranks share its area, and each computes a square for two chunks."""
    args = bench_kernels.parse_args("--device cpu --lengths 160 --ranks 8".split())
    rank = bench_kernels.RingRank(args, select_kernel("cpu", "cpu"), 160)
    area = sum(block.area for plan in rank.plans for block in plan)
    assert area * 8 == 160 * 161 // 2


def test_a_fused_merge_that_is_absent_is_refused():
    with pytest.raises(SystemExit, match="kernel cpu has no fused update on this machine"):
        bench_kernels.main(["--device", "cpu", "--fused-merge"])


def verify(*flags):
    return subprocess.run(
        ["bash", str(REPOSITORY / "scripts/verify_npu.sh"), *flags],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHON": sys.executable},
        timeout=120,
    )


def test_verify_npu_lists_its_checks():
    result = verify("--list")
    assert result.returncode == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "device and kernel",
        "operators, every block shape",
        "kernel choice",
        "parity of every algorithm",
        "parity over all features",
        "launch scripts, dry run",
        "training, every algorithm",
        "training, KV cache policies",
        "training, sequence parallel, distributed optimizer, recompute, bf16",
        "training, packed documents, unaligned",
        "checkpoint and resume",
        "performance",
    ]


def test_verify_npu_refuses_an_unknown_flag():
    result = verify("--devise")
    assert result.returncode == 2 and "--devise is not known" in result.stderr
