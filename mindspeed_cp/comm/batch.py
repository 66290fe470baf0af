"""Messages between single ranks that are posted together, at most one for each peer and direction.

HCCL's batch of sends and receives forbids two for the same rank, and is itself forbidden beside virtual pipeline
stages: there a link posts its messages one by one, in the order of ``turn``. Where shared memory carries a message, or
the ranks tell each other something with it, a notice goes ahead ::

    place in the sender's memory, or BY_GLOO | bytes | number, the tag of what follows by gloo | stamp
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.comm.host_memory import Parcel
from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.watch import wait_for

if TYPE_CHECKING:
    from mindspeed_cp.comm.link import Link

Stamp = tuple[int, int]
BY_GLOO = -1  # the place of a message that follows its notice through gloo


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

    how: Callable
    tensor: torch.Tensor
    rank: int
    tag: int


class Work(NamedTuple):
    """What waits for messages of these ranks; their tensors live until then."""

    work: Any
    ranks: Sequence[int]
    tensors: Sequence[torch.Tensor]


def post_together(link: "Link", ops: Sequence[Posted], purpose: str) -> list[Work]:
    """Post messages in the link's way; the works are in their order."""
    calls = [dist.P2POp(op.how, op.tensor, link.global_ranks[op.rank], link.group, op.tag) for op in ops]
    ranks = [op.rank for op in ops]
    with link.naming(purpose, ranks):
        works = _one_by_one(link, calls, ops) if link.one_by_one else dist.batch_isend_irecv(calls)
    # NCCL and HCCL return one work for the whole batch, gloo one for each operation.
    each = [[op] for op in ops] if len(works) == len(ops) else [ops] * len(works)
    return [Work(work, [op.rank for op in of], [op.tensor for op in of]) for work, of in zip(works, each)]


def _one_by_one(link: "Link", calls: list[dist.P2POp], ops: Sequence[Posted]) -> list[dist.Work | None]:
    """Post every operation by itself; what it returns, in the order of the operations."""
    works: dict[int, dist.Work | None] = dict.fromkeys(range(len(ops)))

    def when(index: int) -> tuple[int, int, int]:
        op = ops[index]
        ends = (link.rank, op.rank) if op.how is dist.isend else (op.rank, link.rank)
        return turn(*ends, link.size)

    for index in sorted(works, key=when):
        call = calls[index]
        works[index] = call.op(call.tensor, call.peer, call.group, call.tag)
    return list(works.values())


@dataclass(frozen=True, eq=False)
class Arrival:
    """A message from a rank, which lands in flat memory, or is announced by a notice.

    Args:
        landing: the memory; None with a notice.
    """

    rank: int
    message: Message
    notice: torch.Tensor | None
    landing: torch.Tensor | None

    @property
    def told(self) -> list[int] | None:
        """The notice's numbers, when it has arrived."""
        return None if self.notice is None else self.notice.tolist()


class Batch:
    """Messages that are posted together."""

    def __init__(self, link: "Link", purpose: str, stamp: Stamp | None = None, check=None) -> None:
        self._link, self.purpose, self._stamp, self._check = link, purpose.partition(".")[0], stamp, check
        self._arrivals: list[Arrival] = []
        self._ops: list[Posted] = []  # receives first, because a notice may ask for one more before sends end
        self._works: list[Work] = []
        self._lent: list[torch.Tensor] = []

    def receive(self, rank: int, message: Message, announced: bool = False) -> None:
        """Have the message from ``rank`` unpacked into its tensors."""
        if message.numel == 0 and self._stamp is None:
            return
        if announced or self._announces(rank, message):
            lands_in = torch.empty(5, dtype=torch.int64, device="cpu")
            self._arrivals.append(Arrival(rank, message, lands_in, None))
        else:
            lands_in = self._flat(message)
            self._arrivals.append(Arrival(rank, message, None, lands_in))
        self._add(dist.irecv, rank, lands_in)

    def send(self, rank: int, message: Message, announced: bool = False, parcel: Parcel | None = None) -> None:
        """Send a message, or the notice of the parcel that holds it."""
        if message.numel == 0 and self._stamp is None:
            return
        if not announced and not self._announces(rank, message):
            self._add(dist.isend, rank, self._written(message))
            return
        carrier, number = self._link.carrier, next(self._link.numbers)
        peer = self._link.global_ranks[rank]
        if parcel is None and carrier is not None and peer in carrier.peers:
            parcel = carrier.write([peer], message)
        place = BY_GLOO if parcel is None else parcel.start
        notice = [place, message.num_bytes, number, *(self._stamp or (0, 0))]
        self._add(dist.isend, rank, torch.tensor(notice, device="cpu"))
        if parcel is None and message.numel:
            self._add(dist.isend, rank, self._written(message), tag=number)

    def post(self) -> None:
        if self._ops:
            self._works = self._link.post(self._ops, self.purpose)
            self._ops = []

    def finish(self) -> None:
        """Wait for all that was posted, and unpack it."""
        self._await(self._works[: len(self._arrivals)])
        notices = [arrival.told for arrival in self._arrivals]
        try:
            self._check_stamps(notices)
            for arrival, notice in zip(self._arrivals, notices):
                with self._link.naming(self.purpose, [arrival.rank]):
                    self._unpack(arrival, notice)
        finally:
            self._release(notices)
        self._await(self._works[len(self._arrivals) :])
        for buffer in self._lent:
            self._link.workspace.give_back(buffer)

    def _release(self, notices: list[list[int] | None]) -> None:
        """Tell peers that what they have in shared memory for this rank has been read."""
        for arrival, notice in zip(self._arrivals, notices):
            if notice is not None and notice[0] != BY_GLOO and self._link.carrier is not None:
                self._link.carrier.release(self._link.global_ranks[arrival.rank], notice[0])

    def _check_stamps(self, notices) -> None:
        if self._check is None:
            return
        stamps = {arrival.rank: (notice[3], notice[4]) for arrival, notice in zip(self._arrivals, notices)}
        self._check([stamps.get(rank, self._stamp) for rank in range(self._link.size)])

    def _unpack(self, arrival: Arrival, notice: list[int] | None) -> None:
        message, landing, carrier = arrival.message, arrival.landing, self._link.carrier
        if notice is not None:
            place, num_bytes, number, *_ = notice
            peer = self._link.global_ranks[arrival.rank]
            if num_bytes != message.num_bytes:
                raise RuntimeError(f"rank {peer} sent {num_bytes} bytes where {message.num_bytes} were expected")
            if num_bytes == 0:
                return
            if place != BY_GLOO and carrier is not None:
                message.read(carrier.read(peer, place, num_bytes).view(message.dtype))
                return
            landing = self._flat(message)
            work = dist.irecv(landing, peer, self._link.group, tag=number)
            self._await([Work(work, [arrival.rank], [landing])])
        if message.in_place is None and landing is not None:
            message.read(landing)

    def _await(self, works) -> None:
        for work, ranks, tensors in works:
            with self._link.naming(self.purpose, ranks):
                wait_for(work, tensors[0].device)

    def _announces(self, rank: int, message: Message) -> bool:
        carrier = self._link.carrier
        return self._stamp is not None or (
            carrier is not None and carrier.carries(self._link.global_ranks[rank], message.device, message.num_bytes)
        )

    def _flat(self, message: Message) -> torch.Tensor:
        """The message's memory where that is contiguous, else borrowed memory of its size."""
        found = message.in_place
        if found is None:
            self._lent.append(self._link.workspace.borrow(message.numel, message.dtype, message.device))
            found = self._lent[-1][: message.numel]
        return found

    def _written(self, message: Message) -> torch.Tensor:
        flat = self._flat(message)
        if message.in_place is None:
            message.write(flat)
        return flat

    def _add(self, op: Callable, rank: int, tensor: torch.Tensor, tag: int = 0) -> None:
        self._ops.append(Posted(op, tensor, rank, tag))
