"""How the ranks of one host meet over a file, without a port: those of the self test, and of this project's tests."""

from datetime import timedelta

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def join(rank: int, world: int, device: str, folder: str, seconds: float) -> None:
    """Make the default process group of this rank, on one thread and on its own device.

    Args:
        device: "cpu", "cuda" or "npu".
        folder: where the ranks meet, empty before.
        seconds: time limit of a collective.
    """
    torch.set_num_threads(1)
    if device != "cpu":
        getattr(torch, device).set_device(rank)
    dist.init_process_group(
        BACKENDS[device],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
