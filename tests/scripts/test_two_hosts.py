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
LATE = {"TEST_LATE_RANK": "3", "TEST_LATE_SECONDS": "6"}  # it imports for longer than a silent peer is waited for

pytestmark = pytest.mark.cpu_only


def start(*arguments, **environment):
    """tests/check hosts as a process."""
    return subprocess.Popen(
        [sys.executable, "tests/check", "hosts", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process):
    """(status, stdout, stderr); skips where namespaces are not permitted."""
    out, err = process.communicate(timeout=300)
    if process.returncode == NOT_PERMITTED:
        pytest.skip("network namespaces are not permitted here")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def runs():
    """A run of both algorithms and one whose link is cut; both at once, because the second mostly waits."""
    processes = [
        start(*ALGORITHMS, "--seq-length", str(SEQ)),
        start("double_ring", "--seq-length", str(SEQ), "--timeout", "5", "--cut-after", "0.3", **LATE),
    ]
    return [finish(process) for process in processes]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_on_the_network_are_the_counted_ones(runs, algorithm):
    status, out, err = runs[0]
    assert status == 0, err[-3000:]
    lines = [json.loads(line[3:]) for line in out.splitlines() if line[3:4] == "{"]
    ranks = [line for line in lines if line["algorithm"] == algorithm]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1, 2, 3]
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


def test_a_cut_link_ends_both_sides_with_an_error(runs):
    _, out, err = runs[1]
    assert "link cut" in out
    statuses = re.search(r"exit status: (\d+) on the first host, (\d+) on the second", out).groups()
    assert all(int(status) != 0 for status in statuses)
    for host in "ab":
        lines = [line for line in err.splitlines() if line.startswith(f"{host}: ")]
        if not any("context parallelism: global rank" in line and "lost" in line for line in lines):
            pytest.fail(f"statuses {statuses}\n" + "\n".join(lines[-100:]))
