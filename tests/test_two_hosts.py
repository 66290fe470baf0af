"""Two network namespaces as two hosts: what is counted is what crosses the network, and a cut link ends both sides."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOT_PERMITTED = 77
OVERHEAD = 0.05  # headers of Ethernet, IP and TCP, acknowledgements, barriers

pytestmark = pytest.mark.cpu_only


def two_hosts(*arguments, **environment):
    """Run scripts/two_hosts.sh; skips where namespaces are not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (ip netns)")
    result = subprocess.run(["bash", "scripts/two_hosts.sh", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "PYTHON": sys.executable, **environment})
    if result.returncode == NOT_PERMITTED:
        pytest.skip("network namespaces are not permitted here")
    return result


@pytest.mark.parametrize("algorithm", ["hybrid", "double_ring"])
def test_bytes_on_the_network_are_the_counted_ones(algorithm):
    result = two_hosts(algorithm)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads(line[3:]) for line in result.stdout.splitlines() if line[3:4] == "{"]
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
    shard = 4096 // 4 * 4 * (64 + 64) * 4
    for rank in ranks:
        if algorithm == "hybrid":
            # Each of two ring ranks holds half the KV heads of twice the tokens: K forward, K again and its gradient backward.
            assert rank["to_other_host"] == 3 * shard
        else:
            # Two windows of two: one crossing of K forward, one backward, one of the gradient; the rest stays within a host.
            assert rank["to_other_host"] == 3 * shard < rank["counted"]["kv"] + rank["counted"]["dkv"]


def test_a_cut_link_ends_both_sides_with_an_error():
    result = two_hosts("double_ring", "--timeout", "8", CUT_AFTER="1")
    assert "link cut" in result.stdout
    statuses = re.search(r"exit status: (\d+) on the first host, (\d+) on the second", result.stdout).groups()
    assert all(int(status) != 0 for status in statuses)
    for host in "ab":
        lines = [line for line in result.stderr.splitlines() if line.startswith(f"{host}: ")]
        assert any("context parallelism: global rank" in line and "lost" in line for line in lines), lines[-20:]
