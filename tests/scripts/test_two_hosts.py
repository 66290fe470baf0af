"""Two network namespaces as two hosts: what is counted is what crosses the network, and a cut link ends both sides."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_PERMITTED = 77
OVERHEAD = 0.05  # headers of Ethernet, IP and TCP, acknowledgements, barriers
ALGORITHMS, SEQ = ("hybrid", "double_ring"), 512
CUT = "--timeout", "5", "--cut-after", "0.3"
LATE = {"TEST_LATE_RANK": "3", "TEST_LATE_SECONDS": "6"}  # it imports for longer than a silent peer is waited for

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def run():
    """(stdout, stderr) of both algorithms, the second of which goes on until its link is cut: ranks start once."""
    result = subprocess.run(
        [sys.executable, "tests/check", "hosts", *ALGORITHMS, "--seq-length", str(SEQ), *CUT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **LATE},
    )
    if result.returncode == NOT_PERMITTED:
        pytest.skip("network namespaces are not permitted here")
    return result.stdout, result.stderr


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_on_the_network_are_the_counted_ones(run, algorithm):
    out, err = run
    lines = [json.loads(line[3:]) for line in out.splitlines() if line[3:4] == "{"]
    ranks = [line for line in lines if line["algorithm"] == algorithm]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1, 2, 3], err[-3000:]
    assert max(rank["error"] for rank in ranks) < 2e-5
    _check_counted(algorithm, ranks)
    for host in (0, 1):
        mine = [rank for rank in ranks if rank["rank"] // 2 == host]
        counted = sum(rank["to_other_host"] for rank in mine)
        # Both ranks of a host read the same device, one barrier apart.
        for rank in mine:
            assert counted <= rank["device_bytes"] <= (1 + OVERHEAD) * counted


def _check_counted(algorithm, ranks):
    """What crosses, by formula: K = local tokens x KV heads x (dk + dv) x 4 bytes; Ulysses stays within a host."""
    shard = SEQ // 4 * 4 * (64 + 64) * 4
    for rank in ranks:
        if algorithm == "hybrid":
            # Each of two ring ranks holds half the KV heads of twice the tokens: K forward, K again and its gradient
            # backward.
            assert rank["to_other_host"] == 3 * shard
        else:
            # Two windows of two: one crossing of K forward, one backward, one of the gradient; the rest stays within a
            # host.
            assert rank["to_other_host"] == 3 * shard < rank["counted"]["kv"] + rank["counted"]["dkv"]


def test_a_cut_link_ends_both_sides_with_an_error(run):
    out, err = run
    assert "link cut" in out
    statuses = re.search(r"exit status: (\d+) on the first host, (\d+) on the second", out).groups()
    assert all(int(status) != 0 for status in statuses)
    for host in "ab":
        lines = [line for line in err.splitlines() if line.startswith(f"{host}: ")]
        if not any("context parallelism: global rank" in line and "lost" in line for line in lines):
            pytest.fail(f"statuses {statuses}\n" + "\n".join(lines[-100:]))
