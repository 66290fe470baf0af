"""scripts/bench kernels runs where there is no accelerator."""

import pytest
from bench import kernels

from mindspeed_cp.kernels import select_kernel

pytestmark = pytest.mark.cpu_only


def test_the_benchmark_prints_a_row_for_each_length(capsys):
    kernels.main("--device cpu --lengths 64 128 --ranks 2 --heads 2 --repeat 1".split())
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["S", "---", "64", "128"]
    assert all(len(row) == 7 for row in rows) and float(rows[2][5]) > 0


def test_the_benchmark_times_the_blocks_of_one_rank_of_a_ring():
    """Sixteenths of the causal triangle: 8 ranks share its area, and each computes a square for two chunks."""
    args = kernels.parse_args("--device cpu --lengths 160 --ranks 8".split())
    rank = kernels.RingRank(args, select_kernel("cpu", "cpu"), 160)
    area = sum(block.area for plan in rank.plans for block in plan)
    assert area * 8 == 160 * 161 // 2


def test_a_fused_merge_that_is_absent_is_refused():
    with pytest.raises(SystemExit, match="kernel cpu has no fused update on this machine"):
        kernels.main(["--device", "cpu", "--fused-merge"])
