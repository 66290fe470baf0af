"""What becomes of ranks that hang, and of a run that trains nothing."""

import json
import os
import sys

import pytest
import torch

from mindspeed_cp.prove import launching, ranks
from mindspeed_cp.prove.recording import Record, Step

FIRST_WAITS = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)"


def run_in(folder, world=1, device="cpu"):
    return ranks.Run("cp=2", "train.py", (), world, str(folder), device=device)


def test_on_a_device_a_rank_that_waits_for_one_that_failed_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-S", "-c", FIRST_WAITS))
    monkeypatch.setattr(ranks, "GRACE", 0.2)
    said, tell = os.pipe()
    ranks._carry_out(run_in(tmp_path, 2, "cuda"), tell)
    found = json.loads(os.read(said, 4096))
    assert found == {"run": "cp=2", "statuses": [None, 3]}
    with pytest.raises(launching.Failure, match=r"rank 1 of the run cp=2 ended with status 3"):
        launching.records_of(run_in(tmp_path, 2), found["statuses"])


def test_a_run_without_a_training_step_is_a_failure(tmp_path):
    for rank, steps in enumerate(([], [Step()])):
        torch.save(Record({"tp": 0} if steps else {}, [], steps), run_in(tmp_path).file(rank, "pt"))
    with pytest.raises(launching.Failure, match="the run cp=2 ended without a training step"):
        launching.records_of(run_in(tmp_path, 2), [0, 0])
