"""scripts/bench mesh: what each link of an emulated mesh carries, by the counters of its devices."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = [sys.executable, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"), "mesh"]
RANKS, LOCAL = 3, 512
SHARD = LOCAL * 32 * (16 + 16) * 2  # bytes of a rank's keys and values


@pytest.mark.cpu_only
def test_every_link_carries_a_shard_of_keys_and_values_twice_and_one_of_gradients():
    """Two calls of the mesh exchange with a full mask; headers and the ranks' own talk add little."""
    arguments = [str(RANKS), "none", "--seq-length", str(RANKS * LOCAL), "--repetitions", "1", "--count"]
    done = subprocess.run([*BENCH, *arguments, "--only", "mesh, full mask"], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    carried = ast.literal_eval(done.stdout.splitlines()[-1])
    for rank, row in enumerate(carried):
        for peer, size in enumerate(row):
            assert peer == rank or 1 <= size / (2 * 3 * SHARD) <= 1.1, carried


def test_a_rate_that_is_none_is_refused():
    done = subprocess.run([*BENCH, "2", "fast"], capture_output=True, text=True)
    assert done.returncode != 0 and "RATE fast must be a number" in done.stderr
