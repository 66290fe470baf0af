"""Sharded checkpoints: written under one set of parallel sizes, resumed under any other."""

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_format
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint_files import Checkpoint, complete, digest_of, now, prepare, settings_of
from trainer.failures import Refused, gather, is_loss_of_a_peer
from trainer.safe_reading import check_metadata


class SynchronousSave(torch_format.TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by torch's own file writer.

    Megatron's writer starts helper processes, which import the whole training script again, and 0.12's does not work
    with torch 2.7 and later. This class can be removed when asynchronous saving is needed and 0.12 is not.
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
    """The sharded state of model, optimizer and schedule; parts that are not sharded are the same on every rank."""
    # chunk.module, so that names in a checkpoint are the model's own, without its wrappers.
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
    """The distributed optimizer's format that can be read with other parallel sizes; its name changed in 0.14."""
    formats = getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())
    if "fully_reshardable" in formats:
        return {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
    return {"sharding_type": "fully_sharded_model_space"}


def _name(chunks, stage):
    return f"model{stage}" if len(chunks) > 1 else "model"


def save_checkpoint(args, chunks, optimizer, scheduler, iteration):
    """Write --save/iter_NNNNNNN and make it the latest when it is complete; collective.

    Raises:
        Refused: a rank could not write its part; the latest checkpoint is then the previous one.
    """
    first, folder = dist.get_rank() == 0, args.save
    state = _state(args, chunks, optimizer, scheduler, iteration, False)
    try:
        name = _on_all_ranks(lambda: prepare(folder, iteration) if first else None)[0]
        dist_checkpointing.save(state, str(Path(folder, name)), SynchronousSave())
        parts = _on_all_ranks(lambda: _finish_part(Path(folder, name)))
        files = {file: entry for part in parts for file, entry in part.items()}
        checkpoint = Checkpoint(folder, name, iteration, now(), *settings_of(args), files)
        _on_all_ranks(lambda: complete(checkpoint, args.keep_last) if first else None)
    except (CheckpointException, OSError, RuntimeError) as error:
        everywhere = isinstance(error, CheckpointException | _Unwritten)  # other errors are not on all ranks
        if not everywhere and is_loss_of_a_peer(error):
            raise
        free = f"{shutil.disk_usage(folder).free:,} bytes are free there"
        raise Refused(
            f"--save {folder}: the checkpoint of step {iteration} could not be written ({_reason(error)}; {free}); "
            f"make room or give another folder, and go on from the checkpoint before it with --load {folder}.",
            everywhere,
            status=1,
        ) from None


class _Unwritten(OSError):
    """Raised on all ranks if one of them could not write."""


def _on_all_ranks(part):
    """Every rank's value of ``part()``, which must not communicate."""
    value, error = None, None
    try:
        value = part()
    except OSError as own:
        error = f"rank {dist.get_rank()}: {_reason(own)}"
    outcomes = gather((value, error))
    for _, error in outcomes:
        if error:
            raise _Unwritten(error)
    return [value for value, _ in outcomes]


def _reason(error):
    """The failure in one line; torch may have collected the failures of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def _finish_part(path):
    """Write this rank's random state; returns name -> [size, SHA-256] of this rank's files: shards and random states
    have its number in their names, and rank 0 wrote the rest.
    """
    state = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    try:
        torch.save(state | {"tracker": dict(get_cuda_rng_tracker().get_states())}, _random_state(path))
    except RuntimeError as error:  # raised by torch's writer when the disk is full
        raise OSError(str(error).splitlines()[0]) from error
    rank = dist.get_rank()
    mine, anybodys = (f"__{rank}_", f"random_{rank}."), ("__", "random_")
    names = [n for n in os.listdir(path) if n.startswith(mine) or rank == 0 and not n.startswith(anybodys)]
    return {name: [Path(path, name).stat().st_size, digest_of(Path(path, name))] for name in names}


def _random_state(path):
    return Path(path, f"random_{dist.get_rank()}.pt")


def load_checkpoint(args, chunks, optimizer, scheduler):
    """Load ``args.resume`` into model, optimizer and schedule; returns the number of finished steps; collective.

    With the same parallel sizes every rank's random state is restored too, so that dropout continues exactly.

    Raises:
        Refused: on every rank, if a file does not match its checksum, or names code to run.
    """
    checkpoint = args.resume
    _check_bytes(args, checkpoint)
    check_metadata(checkpoint.path)
    with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):  # whatever Megatron's calls of torch.load request
        state = dist_checkpointing.load(_state(args, chunks, optimizer, scheduler, 0, True), str(checkpoint.path))
    for stage, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[_name(chunks, stage)])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if checkpoint.parallel == settings_of(args)[1]:
        random = torch.load(_random_state(checkpoint.path), weights_only=True)
        get_cuda_rng_tracker().set_states(random["tracker"])
        torch.cuda.set_rng_state(random["device"])
        torch.set_rng_state(random["cpu"])
    return state["iteration"]


def _check_bytes(args, checkpoint):
    """Compare every file with its checksum; the files are distributed over the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    seen = sorted(set(gather(checkpoint.name)))
    if len(seen) > 1:
        raise Refused(
            f"--load {args.load} shows some ranks {seen[0]} and others {seen[1]}; give a folder that all share."
        )
    if not checkpoint.files and rank == 0:
        print(f"note: {checkpoint.path} was written without checksums; its bytes are not checked.", flush=True)
    parts = gather(checkpoint.damaged(sorted(checkpoint.files)[rank::world], digests=True))
    if wrong := [line for part in parts for line in part]:
        raise Refused(gather(checkpoint.describe_damage(wrong) if rank == 0 else None)[0])
