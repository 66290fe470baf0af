"""Messages of a run that cannot continue: one line if the reason is known, a traceback for a bug, and one line from
each rank that only lost another rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from trainer.rules import leave, leave_with_one_line

PROGRAM = "pretrain_gpt.py"
# Parts of messages of gloo, NCCL, the store and this package about a peer that is gone or silent.
LOST = (
    "lost rank", "Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out waiting",
    "timed out", "connectFullMesh", "Socket Timeout", "failed to recv", "waited",
)  # fmt: skip


class Refused(ValueError):
    """The run cannot continue; the message names what, why and a way out.

    Args:
        everywhere: whether every rank raises this, so that only one must print it; else only this rank raises it.
        status: the exit status; 2 for errors that could be known before the first step.
    """

    def __init__(self, message: str, everywhere: bool = True, status: int = 2):
        super().__init__(message)
        self.everywhere, self.status = everywhere, status


def gather(value: Any) -> list[Any]:
    """Every rank's ``value`` (small and picklable), in rank order; collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def readable_flags() -> Iterator[None]:
    """Context manager that turns a ValueError, caused by a flag, into one line and exit status 2."""
    try:
        yield
    except ValueError as error:
        leave_with_one_line(f"{PROGRAM}: error: {error}", 2)


@contextmanager
def readable_failures(rank: int) -> Iterator[None]:
    """Context manager that reports failures once: rank 0 prints a refusal, each rank that lost another prints one line,
    and this rank's own errors are raised with their traceback.
    """
    try:
        yield
    except Refused as error:
        speaks = rank == 0 or not error.everywhere
        leave(f"{PROGRAM}: error: {error}" if speaks else None, error.status)
    except KeyboardInterrupt:
        leave(f"{PROGRAM}: interrupted." if rank == 0 else None, 130)
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        if not is_loss_of_a_peer(error):
            raise
        leave(f"rank {rank}: {_first_line(error)} (another rank has failed or is silent: read its output first)", 1)


def is_loss_of_a_peer(error: BaseException | None) -> bool:
    """Whether ``error``, or its cause, means that another rank is gone or silent."""
    while error is not None:
        if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error):
    """The message without source positions, call stacks and advice."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = text.partition(". This is typically")[0]
    return text.partition("] ")[2] if text.startswith("[/") else text
