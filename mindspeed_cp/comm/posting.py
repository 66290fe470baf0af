"""One process group seen from one rank, and how single messages are posted in it."""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.comm.host_memory import HostMemory
from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.notices import stream_of
from mindspeed_cp.comm.workspace import Workspace

# Process group, while it exists -> counter of its messages that follow a notice.
_numbers: "weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]]" = weakref.WeakKeyDictionary()
# Process group, while it exists -> the error of a pass that ended in the middle.
_interrupted: "weakref.WeakKeyDictionary[dist.ProcessGroup, str]" = weakref.WeakKeyDictionary()


def turn(sender: int, receiver: int, size: int) -> tuple[int, int, int]:
    """Return the position of a message in the order of its batch, the same on both ends and comparable with all others.

    If all ranks finish their messages one by one in the same global order, they cannot deadlock: the first unfinished
    message is always the next one of both its sender and its receiver. Messages over the same distance in ranks are
    adjacent in the order, those from every second rank of their cycle first, so that a ring of even size needs two
    rounds and one of odd size three.
    """
    step = (receiver - sender) % size
    circles = math.gcd(step, size)
    around = size // circles
    place = sender // circles * pow(step // circles, -1, around) % around
    return step, 2 if place == around - 1 and around % 2 else place % 2, sender


class Posted(NamedTuple):
    """A message to be posted: ``how`` is dist.isend or dist.irecv, ``rank`` the peer's rank in the link."""

    how: Callable[..., Any]
    tensor: torch.Tensor
    rank: int
    tag: int


class Work(NamedTuple):
    """A handle that waits for messages from these ranks and keeps their tensors alive until then."""

    work: Any
    ranks: Sequence[int]
    tensors: Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """A rank as a member of a process group. Peers are named by their rank in it.

    Args:
        group: process group. rank: this rank's index in ``global_ranks``.
        global_ranks: of the members, in the order of their ranks here; collectives need it ascending.
        workspace: reused buffers.
        carrier: shared memory with the members on this host, or None.
        one_by_one: post the messages of a batch one by one, not as one batch of the back end.
    """

    group: dist.ProcessGroup
    rank: int
    global_ranks: tuple[int, ...]
    workspace: Workspace = field(default_factory=Workspace, repr=False)
    carrier: HostMemory | None = field(default=None, repr=False)
    one_by_one: bool = False
    _streams: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.global_ranks)

    @property
    def backend(self) -> str:
        """Name of the back end that sends the messages."""
        return dist.get_backend(self.group)

    @property
    def numbers(self) -> Iterator[int]:
        """Counter that numbers messages after their notices; all members of one process group share it."""
        return _numbers.setdefault(self.group, itertools.count(1))

    def stream(self, tag: int) -> int:
        """Number of the stream of notices for this group and tag."""
        if tag not in self._streams:
            self._streams[tag] = stream_of(self.group, tag)
        return self._streams[tag]

    def interrupt(self, error: str) -> None:
        """Refuse further transfers over this group: those of a pass that ended with ``error`` may be under way."""
        if self.group is not None:  # the planner's links have none
            _interrupted.setdefault(self.group, error)

    def check_uninterrupted(self) -> None:
        """Raise RuntimeError if a pass over this group ended with an error on this rank."""
        error = _interrupted.get(self.group) if _interrupted and self.group is not None else None
        if error is not None:
            raise RuntimeError(
                f"an earlier pass of context parallelism over these process groups ended with an error on global rank "
                f"{dist.get_rank()} ({error}), and its messages may still be under way; make the process groups again "
                "(ContextParallelGroups.build without cp_group), pass others, or restart all ranks."
            )

    @property
    def peers(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def post(self, ops: Sequence[Posted], purpose: str) -> list[Work]:
        """Start the single messages of one batch; links that only record messages override it."""
        return post_together(self, ops, purpose)

    @contextmanager
    def naming(self, purpose: str, ranks: Sequence[int]) -> Iterator[None]:
        """Turn a back end's error into one that names the ranks it waited for and the purpose."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            who = ", ".join(str(rank) for rank in sorted({self.global_ranks[rank] for rank in ranks}))
            raise RuntimeError(
                f"context parallelism: global rank {dist.get_rank()} lost rank {who} while exchanging {purpose}; "
                f"look at the log of that rank first. Back end: {error}"
            ) from error


class Loans:
    """Buffers that one transfer borrows from a workspace until it ends."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._lent = workspace, list[torch.Tensor]()

    def flat(self, message: Message, like: torch.Tensor | None = None) -> torch.Tensor:
        """Return the message's own memory if it is contiguous, else a borrowed buffer of its size.

        Args:
            like: a tensor on the device to use if the message may be empty.
        """
        found = message.in_place
        if found is None:
            device = message.device if like is None else like.device
            self._lent.append(self._workspace.borrow(message.numel, message.dtype, device))
            found = self._lent[-1][: message.numel]
        return found

    def written(self, message: Message, like: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``flat`` with the message copied into it."""
        flat = self.flat(message, like)
        if message.in_place is None:
            message.write(flat)
        return flat

    def give_back(self) -> None:
        while self._lent:
            self._workspace.give_back(self._lent.pop(0))


def post_together(member: Member, ops: Sequence[Posted], purpose: str) -> list[Work]:
    """Post messages as a batch or one by one, as ``member`` requires; the works are in the order of ``ops``."""
    calls = [dist.P2POp(op.how, op.tensor, member.global_ranks[op.rank], member.group, op.tag) for op in ops]
    ranks = [op.rank for op in ops]
    with member.naming(purpose, ranks):
        works = _one_by_one(member, calls, ops) if member.one_by_one else dist.batch_isend_irecv(calls)
    # NCCL and HCCL return one work for the whole batch, gloo one for each operation.
    each = [[op] for op in ops] if len(works) == len(ops) else [ops] * len(works)
    return [Work(work, [op.rank for op in of], [op.tensor for op in of]) for work, of in zip(works, each)]


def _one_by_one(member: Member, calls: list[dist.P2POp], ops: Sequence[Posted]) -> list[dist.Work | None]:
    """Post every operation separately; return the works in the order of the operations."""
    works: dict[int, dist.Work | None] = dict.fromkeys(range(len(ops)))

    def when(index: int) -> tuple[int, int, int]:
        op = ops[index]
        ends = (member.rank, op.rank) if op.how is dist.isend else (op.rank, member.rank)
        return turn(*ends, member.size)

    for index in sorted(works, key=when):
        call = calls[index]
        works[index] = call.op(call.tensor, call.peer, call.group, call.tag)
    return list(works.values())
