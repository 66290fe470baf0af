"""HCCL buffer sizes of the process groups that this project makes in addition to Megatron's."""

import os

import torch.distributed as dist

from mindspeed_cp.comm.hccl import buffers_of
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup


def hccl_buffers(config: ContextParallelConfig, setup: TrainingSetup | None) -> dict[str, int]:
    """MB by group, from the largest message of each; empty on other backends, or if the user has set HCCL_BUFFSIZE,
    which then applies to every group."""
    if setup is None or "hccl" not in dist.get_backend() or os.environ.get("HCCL_BUFFSIZE"):
        return {}
    return buffers_of(config, setup)
