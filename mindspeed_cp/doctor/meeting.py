"""Rendezvous of ranks on one host through a file, without a port; for the self test and this project's tests."""

from datetime import timedelta

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def join(rank: int, world: int, device: str, folder: str, seconds: float) -> None:
    """Initialise this rank's default process group, with one CPU thread and the rank's own device.

    Args:
        device: "cpu", "cuda" or "npu".
        folder: an empty folder for the rendezvous file.
        seconds: timeout of a collective.
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
