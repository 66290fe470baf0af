"""scripts/bench mesh: what each link of an emulated mesh carries, by the counters of its devices."""

import ast
import subprocess
import sys
from pathlib import Path

import pairs
import pytest

BENCH = [sys.executable, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"), "mesh"]
RANKS, LOCAL = 3, 512
WHOLE = pytest.mark.skipif(not pairs.whole(), reason="another start of all ranks: --full")
SHARD = LOCAL * 32 * (16 + 16) * 2  # bytes of a rank's keys and values


def mesh_exchange(rank, peer):
    """Shards of keys and values that a call sends from rank to peer: twice all rows that are needed, and gradients."""
    return 3.0


def causal_direct_exchange(rank, peer):
    """A causal zigzag: a later rank's shard is needed whole, and half of an earlier one's; gradients return."""
    return 2.5 if rank > peer else 2.0


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "name, shards",
    [("mesh, full mask", mesh_exchange), pytest.param("direct, all in flight", causal_direct_exchange, marks=WHOLE)],
)
def test_every_link_carries_the_rows_that_are_needed_twice_and_their_gradients_once(name, shards):
    """Two calls; headers and the ranks' own talk add little."""
    arguments = [str(RANKS), "none", "--seq-length", str(RANKS * LOCAL), "--repetitions", "1", "--count"]
    done = subprocess.run([*BENCH, *arguments, "--only", name], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    carried = ast.literal_eval(done.stdout.splitlines()[-1])
    for rank, row in enumerate(carried):
        for peer, size in enumerate(row):
            assert peer == rank or 1 <= size / (2 * shards(rank, peer) * SHARD) <= 1.1, carried


def test_a_rate_that_is_none_is_refused():
    done = subprocess.run([*BENCH, "2", "fast"], capture_output=True, text=True)
    assert done.returncode != 0 and "RATE fast must be a number" in done.stderr
