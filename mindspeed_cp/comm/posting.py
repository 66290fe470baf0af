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

# Of every process group, as long as it lives: the number of its last message that follows a notice.
_numbers: "weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]]" = weakref.WeakKeyDictionary()


def turn(sender: int, receiver: int, size: int) -> tuple[int, int, int]:
    """When a message has its turn among those of a batch, the same on both of its ends and comparable with all others.

    Ranks whose messages are finished one after the other in one order that all of them share never wait in a circle:
    the first unfinished message of all is the next one of its sender and of its receiver. Messages that jump equally
    far come together, those from every second rank of their circle first, so that a ring of any even size is done in
    two rounds and one of odd size in three.
    """
    step = (receiver - sender) % size
    circles = math.gcd(step, size)
    around = size // circles
    place = sender // circles * pow(step // circles, -1, around) % around
    return step, 2 if place == around - 1 and around % 2 else place % 2, sender


class Posted(NamedTuple):
    """A message to be posted: ``how`` is dist.isend or dist.irecv, ``rank`` the peer's place in the link."""

    how: Callable[..., Any]
    tensor: torch.Tensor
    rank: int
    tag: int


class Work(NamedTuple):
    """What waits for messages of these ranks; their tensors live until then."""

    work: Any
    ranks: Sequence[int]
    tensors: Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """A rank as a member of a process group. Peers are named by their rank in it.

    Args:
        group: process group. rank: this rank's place in ``global_ranks``.
        global_ranks: of the members, in the order in which they count; collectives want it ascending.
        workspace: reused buffers.
        carrier: shared memory with the members on this host, or None.
        one_by_one: post the messages of a batch one after the other, not as the back end's batch.
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
        """The name of what carries the messages."""
        return dist.get_backend(self.group)

    @property
    def numbers(self) -> Iterator[int]:
        """Tells messages apart that follow their notice; all members over one group count on."""
        return _numbers.setdefault(self.group, itertools.count(1))

    def stream(self, tag: int) -> int:
        """Tells notices of messages of this group and tag from others."""
        if tag not in self._streams:
            self._streams[tag] = stream_of(self.group, tag)
        return self._streams[tag]

    @property
    def peers(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def post(self, ops: Sequence[Posted], purpose: str) -> list[Work]:
        """Start single messages of one batch; a place of its own for links that only take notes."""
        return post_together(self, ops, purpose)

    @contextmanager
    def naming(self, purpose: str, ranks: Sequence[int]) -> Iterator[None]:
        """Turn a back end's error into one that says who was waited for and why."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            who = ", ".join(str(rank) for rank in sorted({self.global_ranks[rank] for rank in ranks}))
            raise RuntimeError(
                f"context parallelism: global rank {dist.get_rank()} lost rank {who} while exchanging {purpose}; "
                f"look at the log of that rank first. Back end: {error}"
            ) from error


class Loans:
    """Memory that one transfer borrows from a workspace, until it has ended."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._lent = workspace, list[torch.Tensor]()

    def flat(self, message: Message, like: torch.Tensor | None = None) -> torch.Tensor:
        """The message's memory where that is contiguous, else borrowed memory of its size.

        Args:
            like: on whose device, where the message may be empty.
        """
        found = message.in_place
        if found is None:
            device = message.device if like is None else like.device
            self._lent.append(self._workspace.borrow(message.numel, message.dtype, device))
            found = self._lent[-1][: message.numel]
        return found

    def written(self, message: Message, like: torch.Tensor | None = None) -> torch.Tensor:
        """``flat``, and the message in it."""
        flat = self.flat(message, like)
        if message.in_place is None:
            message.write(flat)
        return flat

    def give_back(self) -> None:
        while self._lent:
            self._workspace.give_back(self._lent.pop(0))


def post_together(member: Member, ops: Sequence[Posted], purpose: str) -> list[Work]:
    """Post messages in the member's way; the works are in their order."""
    calls = [dist.P2POp(op.how, op.tensor, member.global_ranks[op.rank], member.group, op.tag) for op in ops]
    ranks = [op.rank for op in ops]
    with member.naming(purpose, ranks):
        works = _one_by_one(member, calls, ops) if member.one_by_one else dist.batch_isend_irecv(calls)
    # NCCL and HCCL return one work for the whole batch, gloo one for each operation.
    each = [[op] for op in ops] if len(works) == len(ops) else [ops] * len(works)
    return [Work(work, [op.rank for op in of], [op.tensor for op in of]) for work, of in zip(works, each)]


def _one_by_one(member: Member, calls: list[dist.P2POp], ops: Sequence[Posted]) -> list[dist.Work | None]:
    """Post every operation by itself; what it returns, in the order of the operations."""
    works: dict[int, dist.Work | None] = dict.fromkeys(range(len(ops)))

    def when(index: int) -> tuple[int, int, int]:
        op = ops[index]
        ends = (member.rank, op.rank) if op.how is dist.isend else (op.rank, member.rank)
        return turn(*ends, member.size)

    for index in sorted(works, key=when):
        call = calls[index]
        works[index] = call.op(call.tensor, call.peer, call.group, call.tag)
    return list(works.values())
