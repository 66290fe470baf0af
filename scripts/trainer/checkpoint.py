"""Sharded checkpoints: written under one set of parallel sizes, resumed under any other."""

from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_format
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

LATEST = "latest.txt"


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
    """Write --save/iter_NNNNNNN and name it in latest.txt once it is complete; collective."""
    folder = Path(args.save, f"iter_{iteration:07d}")
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(
        _state(args, chunks, optimizer, scheduler, iteration, False), str(folder), SynchronousSave()
    )
    dist.barrier()
    if dist.get_rank() == 0:
        Path(args.save, LATEST).write_text(folder.name, encoding="utf-8")
    dist.barrier()


def load_checkpoint(args, chunks, optimizer, scheduler):
    """Read the latest checkpoint of --load into everything; returns the number of finished steps; collective."""
    folder = Path(args.load, Path(args.load, LATEST).read_text(encoding="utf-8").strip())
    state = dist_checkpointing.load(_state(args, chunks, optimizer, scheduler, 0, True), str(folder))
    for stage, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[_name(chunks, stage)])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["iteration"]
