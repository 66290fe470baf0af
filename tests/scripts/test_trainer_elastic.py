"""torchrun --max-restarts: ranks are killed at every phase of a run, which ends with an undisturbed run's losses."""

import subprocess
import sys

import pytest
from trainer_runs import REPOSITORY, environment

PHASES = ("groups", "forward", "backward", "shards", "latest")  # tests/check/faults.py knows two more
pytestmark = pytest.mark.cpu_only


def test_a_run_whose_ranks_are_killed_at_every_phase_ends_with_the_same_losses():
    command = [sys.executable, str(REPOSITORY / "tests/check"), "faults", "--together", "--markdown"]
    command += ["--kinds", "kill", "--phases", *PHASES]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| kill")]
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row[1] for row in rows] == list(PHASES)
    assert {row[2] for row in rows} == {"same losses, bit by bit"}
    resumed = [int(row[4]) if row[4].isdigit() else 0 for row in rows]
    assert resumed == sorted(resumed) and resumed[-1] >= 6, rows
