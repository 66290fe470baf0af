"""All warnings go through here: each is printed once, on rank 0 or on the rank that it concerns.

Before the process group exists, torchrun's RANK says which rank this is.
"""

import os
import warnings

import torch.distributed as dist


class ContextParallelWarning(UserWarning):
    """A fallback or an ignored setting; filter this class to act on it."""


def is_rank0() -> bool:
    """True on global rank 0, also before the process group exists (torchrun's RANK), and in a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def warn_rank0(message: str) -> None:
    """Issue a ContextParallelWarning on rank 0 only; Python's warning filter prints each text once."""
    if is_rank0():
        warnings.warn(message, ContextParallelWarning, stacklevel=3)


def warn_this_rank(message: str) -> None:
    """Like ``warn_rank0``, but on this rank: for problems that may concern single ranks."""
    warnings.warn(message, ContextParallelWarning, stacklevel=3)
