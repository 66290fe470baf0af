"""Sharded checkpoints: written under one set of parallel sizes, resumed under any other."""

import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_format
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint_files import MODEL, PARALLEL, Checkpoint, complete, digest_of, now, prepare
from trainer.failures import Refused, gather, is_loss_of_a_peer
from trainer.random_state import load_random_state, save_random_state
from trainer.safe_reading import check_metadata, tensors_alone


class SynchronousSave(torch_format.TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by torch's own file writer.

    Megatron's writer starts helper processes, which import the whole training script once more, and that of 0.12 does
    not work with torch 2.7 and later. Can go when asynchronous saving is wanted and 0.12 is not.
    """

    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict, checkpoint_dir):
        state, _, _ = torch_format._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = torch_format.MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        torch_checkpoint.save(
            torch_format.mcore_to_pyt_state_dict(state, False),
            planner=planner,
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
        )


def _state(args, chunks, optimizer, scheduler, iteration, is_loading):
    """The sharded state of model, optimizer and schedule; what is not sharded is the same on every rank."""
    # chunk.module: the names in a checkpoint are the model's own, without those of its wrappers.
    models = {_name(chunks, stage): chunk.module.sharded_state_dict() for stage, chunk in enumerate(chunks)}
    everything = models if len(chunks) > 1 else models["model"]
    how = _reshardable_format() if args.use_distributed_optimizer else {}
    return {
        **models,
        "optimizer": optimizer.sharded_state_dict(everything, is_loading=is_loading, **how),
        "scheduler": scheduler.state_dict(),
        "iteration": iteration,
    }


def _reshardable_format():
    """The format of the distributed optimizer that other parallel sizes can read; its name changed with 0.14."""
    formats = getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())
    if "fully_reshardable" in formats:
        return {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
    return {"sharding_type": "fully_sharded_model_space"}


def _name(chunks, stage):
    return f"model{stage}" if len(chunks) > 1 else "model"


def save_checkpoint(args, chunks, optimizer, scheduler, iteration):
    """Write --save/iter_NNNNNNN and make it the latest once it is complete; collective.

    Raises:
        Refused: a rank could not write its part; the latest checkpoint is then the one before.
    """
    folder, first = args.save, dist.get_rank() == 0
    name = f"iter_{iteration:07d}"
    _together(args, iteration, lambda: prepare(folder, iteration) if first else None)
    _save_state(args, _state(args, chunks, optimizer, scheduler, iteration, False), Path(folder, name))
    parts = _together(args, iteration, lambda: _finish_part(Path(folder, name)))
    files = {file: entry for part in parts for file, entry in part.items()}
    checkpoint = Checkpoint(folder, name, iteration, now(), **_settings(args), files=files)
    _together(args, iteration, lambda: complete(checkpoint, args.keep_last) if first else None)


def _together(args, iteration, part):
    """Every rank's value of ``part()``, which communicates nothing: its failure on one rank is a failure on all."""
    value, error = None, None
    try:
        value = part()
    except OSError as own:
        error = f"rank {dist.get_rank()}: {_reason(own)}"
    outcomes = gather((value, error))
    errors = [error for _, error in outcomes if error]
    if errors:
        raise _save_failed(args, iteration, errors[0])
    return [value for value, _ in outcomes]


def _save_state(args, state, path):
    iteration = state["iteration"]
    try:
        dist_checkpointing.save(state, str(path), SynchronousSave())
    except CheckpointException as error:  # torch has told every rank
        raise _save_failed(args, iteration, _reason(error)) from None
    except (OSError, RuntimeError) as error:
        if is_loss_of_a_peer(error):
            raise
        raise _save_failed(args, iteration, _reason(error), everywhere=False) from None


def _finish_part(path):
    """Write this rank's random state; name -> [size, SHA-256] of what this rank has written."""
    save_random_state(path)
    mine = [Path(path, name) for name in os.listdir(path) if writer_of(name) == dist.get_rank()]
    return {file.name: [file.stat().st_size, digest_of(file)] for file in mine}


def writer_of(name: str) -> int:
    """The rank that wrote a file of a checkpoint: shards and random states carry its number, rank 0 wrote the rest."""
    found = re.fullmatch(r"__([0-9]+)_[0-9]+\.distcp|random_([0-9]+)\.pt", name)
    return int(found.group(1) or found.group(2)) if found else 0


def _save_failed(args, iteration, reason, everywhere=True):
    room = f"{shutil.disk_usage(args.save).free:,} bytes are free there"
    return Refused(
        f"--save {args.save}: the checkpoint of step {iteration} could not be written ({reason}; {room}); make room or "
        f"give another folder, and go on from the checkpoint before it with --load {args.save}.",
        everywhere,
        status=1,
    )


def _reason(error):
    """The failure itself in one line, where torch has collected the failures of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def _settings(args):
    """The flags that a checkpoint's record keeps."""
    return {
        part: {name: getattr(args, name) for name in names}
        for part, names in {"model": MODEL, "parallel": PARALLEL}.items()
    }


def load_checkpoint(args, chunks, optimizer, scheduler):
    """Read ``args.resume`` into everything; returns the number of finished steps; collective.

    Raises:
        Refused: on every rank, when a file holds other bytes than were written, or names code to run.
    """
    checkpoint = args.resume
    _check_bytes(args, checkpoint)
    check_metadata(checkpoint.path)
    with tensors_alone():
        state = dist_checkpointing.load(_state(args, chunks, optimizer, scheduler, 0, True), str(checkpoint.path))
    for stage, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[_name(chunks, stage)])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if checkpoint.parallel == _settings(args)["parallel"]:
        load_random_state(checkpoint.path)
    return state["iteration"]


def _check_bytes(args, checkpoint):
    """Compare every file with its checksum, the files shared out over the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    seen = sorted(set(gather(checkpoint.name)))
    if len(seen) > 1:
        raise Refused(
            f"--load {args.load} shows some ranks {seen[0]} and others {seen[1]}; give a folder that all share."
        )
    wrong = gather(checkpoint.damaged(sorted(checkpoint.files)[rank::world], digests=True))
    wrong = [line for part in wrong for line in part]
    if wrong:
        raise Refused(gather(checkpoint.describe_damage(wrong) if rank == 0 else None)[0])
    if not checkpoint.files and rank == 0:
        print(f"note: {checkpoint.path} was written without checksums; its bytes are not checked.", flush=True)
