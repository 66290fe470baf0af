"""What restarts rely on: ranks of one attempt find each other, checkpoints are read safely, logs say a step once."""

import json
import os
import pickle
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from trainer.checkpoint_files import write_atomically
from trainer.failures import Refused, is_loss_of_a_peer, readable_failures
from trainer.rendezvous import meet
from trainer.report import keep_steps
from trainer.safe_reading import check_metadata
from trainer_files import write_checkpoint

pytestmark = pytest.mark.cpu_only


def attempt(store, ranks, world_size, seconds=20.0):
    """Names on which the living ``ranks`` agreed, each a thread; an exception stands for itself."""
    names = {}

    def come(rank):
        try:
            names[rank] = meet(store, rank, world_size, timedelta(seconds=seconds))
        except Exception as error:
            names[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return names


@pytest.mark.parametrize("died_in", ["after they met", "before they met", "before rank 0 came"])
def test_ranks_of_a_new_attempt_agree_on_a_name_that_no_earlier_attempt_had(died_in):
    store = dist.HashStore()
    came = {"after they met": [0, 1, 2], "before they met": [0, 2], "before rank 0 came": [1, 2]}[died_in]
    earlier = attempt(store, came, 3, seconds=20.0 if len(came) == 3 else 0.3)
    assert len(came) == 3 or all(isinstance(name, dist.DistStoreError) for name in earlier.values())
    seen = {str(name) for name in earlier.values()}
    for _ in range(3):  # restarts
        names = attempt(store, [2, 1, 0], 3)
        assert sorted(names) == [0, 1, 2] and len(set(names.values())) == 1, names
        assert not seen & set(names.values())
        seen |= set(names.values())


def test_a_rank_that_is_alone_says_so_in_time():
    assert "waited 0:00:00.2" in str(attempt(dist.HashStore(), [1], 2, seconds=0.2)[1])


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".metadata").write_bytes(pickle.dumps(Metadata({}, {"a": Malicious()})))
    with pytest.raises(Refused, match="would run (posix|os).system.*load only checkpoints you trust"):
        check_metadata(tmp_path)
    assert not Path("was_run").exists()
    Path(".metadata").write_bytes(pickle.dumps(Metadata({}))[:-3])
    with pytest.raises(Refused, match="is damaged"):
        check_metadata(tmp_path)


def test_metadata_of_tensors_is_read(tmp_path):
    import torch

    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    entry = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4]), [chunk])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": entry})))
    check_metadata(tmp_path)


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "latest.txt"
    write_atomically(path, "iter_0000002")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomically(path, "iter_0000004")
    assert path.read_text(encoding="utf-8") == "iter_0000002"


def test_keep_last_removes_the_oldest_and_only_checkpoints(tmp_path):
    from argparse import Namespace

    from trainer.checkpoint_files import MODEL, PARALLEL

    args = Namespace(**dict.fromkeys((*MODEL, *PARALLEL), 1))
    (tmp_path / "iter_notes").mkdir()
    for iteration in (2, 4, 6, 8):
        write_checkpoint(tmp_path, iteration, args, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000006", "iter_0000008", "iter_notes"]
    assert (tmp_path / "latest.txt").read_text(encoding="utf-8") == "iter_0000008"


def test_the_log_of_a_resumed_run_holds_every_step_once(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text("".join(json.dumps({"iteration": step}) + "\n" for step in (1, 2, 3)) + '{"iterat', encoding="utf-8")
    keep_steps(log, 2)
    assert [json.loads(line)["iteration"] for line in log.read_text(encoding="utf-8").splitlines()] == [1, 2]
    keep_steps(log, 0)
    assert log.read_text(encoding="utf-8") == ""


def lost():
    raise RuntimeError("[/pytorch/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically")


def refused():
    raise Refused("--save x: no space", status=1)


@pytest.mark.parametrize(
    "fail, rank, says", [(lost, 1, "rank 1: Read error"), (refused, 0, "--save x"), (refused, 1, "")]
)
def test_failures_that_are_not_this_ranks_own_take_one_line(fail, rank, says, capsys):
    with pytest.raises(SystemExit) as exit_, readable_failures(rank):
        fail()
    printed = capsys.readouterr().err
    assert exit_.value.code == 1 and says in printed and printed.count("\n") == bool(says), printed


def test_a_bug_of_this_rank_keeps_its_traceback():
    with pytest.raises(KeyError), readable_failures(0):
        raise KeyError("own")
    assert not is_loss_of_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
