"""Saves every rank's random state beside a checkpoint, so that under the same sizes dropout goes on where it was."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def save_random_state(path: Path) -> None:
    """Write random_RANK.pt into the checkpoint ``path``."""
    state = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    try:
        torch.save(state, _file(path))
    except RuntimeError as error:  # torch's writer says so when the disk is full
        raise OSError(str(error).splitlines()[0]) from error


def load_random_state(path: Path) -> None:
    """Set what ``save_random_state`` wrote, if it did: earlier versions of this trainer wrote none."""
    if _file(path).is_file():
        state = torch.load(_file(path), weights_only=True)
        get_cuda_rng_tracker().set_states(state["tracker"])
        torch.cuda.set_rng_state(state["device"])
        torch.set_rng_state(state["cpu"])


def _file(path):
    return Path(path, f"random_{dist.get_rank()}.pt")
