"""HCCL buffer sizes of the process groups that carry attention: those that this project makes, and Megatron's own."""

import os

import torch.distributed as dist

from mindspeed_cp.comm.hccl import DEFAULT_MEGABYTES, buffers_of
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup


def hccl_buffers(config: ContextParallelConfig, setup: TrainingSetup | None) -> dict[str, int]:
    """MB by group, from the largest message of each; empty on other backends, or if the user has set HCCL_BUFFSIZE,
    which then applies to every group."""
    if setup is None or "hccl" not in dist.get_backend() or os.environ.get("HCCL_BUFFSIZE"):
        return {}
    return buffers_of(config, setup)


def megatron_buffers(config: ContextParallelConfig, setup: TrainingSetup | None) -> dict[str, int]:
    """As ``hccl_buffers``, for the context-parallel group that Megatron makes. Megatron's messages travel in it too,
    of sizes that are not known here: it never gets less than HCCL gives."""
    megabytes = hccl_buffers(config, setup).get("cp", 0)
    return {"cp": megabytes} if megabytes > DEFAULT_MEGABYTES else {}
