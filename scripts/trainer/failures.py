"""The messages of a run that cannot go on: one line where the reason is known, a traceback for a bug, and one line
from each rank that only lost another.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed as dist

from trainer.rules import leave_with_one_line

PROGRAM = "pretrain_gpt.py"
# What gloo, NCCL, the store and this package say of a peer that is gone or silent.
LOST = (
    "lost rank", "Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out waiting",
    "timed out", "connectFullMesh", "Socket Timeout", "failed to recv", "waited",
)  # fmt: skip


class Refused(ValueError):
    """The run cannot go on; the message names what, why and a way out.

    Args:
        everywhere: every rank raises this, so that one of them is enough to say it; else this rank alone raises it.
        status: the exit status; 2 is for what could be known before the first step.
    """

    def __init__(self, message: str, everywhere: bool = True, status: int = 2):
        super().__init__(message)
        self.everywhere, self.status = everywhere, status


def gather(value: Any) -> list[Any]:
    """Every rank's ``value`` (small, picklable), in rank order; collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def readable_flags() -> Iterator[None]:
    """A ValueError inside, which a flag caused, becomes one line and exit status 2."""
    try:
        yield
    except ValueError as error:
        leave_with_one_line(f"{PROGRAM}: error: {error}", 2)


@contextmanager
def readable_failures(rank: int) -> Iterator[None]:
    """Say once what goes wrong inside: rank 0 says a refusal, each rank that lost another one says that in a line, and
    an error of this rank's own passes on with its traceback.
    """
    try:
        yield
    except Refused as error:
        speaks = rank == 0 or not error.everywhere
        _leave(f"{PROGRAM}: error: {error}" if speaks else None, error.status)
    except KeyboardInterrupt:
        _leave(f"{PROGRAM}: interrupted." if rank == 0 else None, 130)
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        if not is_loss_of_a_peer(error):
            raise
        _leave(f"rank {rank}: {_first_line(error)} (another rank has failed or is silent: read what it says first)", 1)


def is_loss_of_a_peer(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that another rank is gone or silent."""
    while error is not None:
        if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error):
    """The message without source positions, call stacks and good wishes."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = text.partition(". This is typically")[0]
    return text.partition("] ")[2] if text.startswith("[/") else text


def _leave(line, status) -> NoReturn:
    if line:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    raise SystemExit(status)
