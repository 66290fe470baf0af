"""Messages between single ranks that are posted together, at most one for each peer and direction.

HCCL's batch of sends and receives forbids two for the same rank, and is itself forbidden beside virtual pipeline
stages: there a link posts its messages one by one, in the order of ``turn``. Where shared memory carries a message, or
the ranks tell each other something with it, a notice goes ahead ::

    place in the sender's memory, or BY_GLOO | bytes | number, the tag of what follows by gloo | stamp
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.comm.host_memory import Parcel
from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.meter import named, wait_for
from mindspeed_cp.comm.posting import Loans, Member, Posted, Work

Stamp = tuple[int, int]
BY_GLOO = -1  # the place of a message that follows its notice through gloo


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

    def __init__(
        self,
        link: Member,
        purpose: str,
        stamp: Stamp | None = None,
        check: Callable[[list[Stamp]], None] | None = None,
        tag: int = 0,
    ) -> None:
        self._tag = tag
        self._link, self.purpose, self._stamp, self._check = link, purpose.partition(".")[0], stamp, check
        self._arrivals: list[Arrival] = []
        self._ops: list[Posted] = []  # receives first, because a notice may ask for one more before sends end
        self._works: list[Work] = []
        self._loans = Loans(link.workspace)

    def receive(self, rank: int, message: Message, announced: bool = False) -> None:
        """Have the message from ``rank`` unpacked into its tensors."""
        if message.numel == 0 and self._stamp is None:
            return
        if announced or self._announces(rank, message):
            lands_in = torch.empty(5, dtype=torch.int64, device="cpu")
            self._arrivals.append(Arrival(rank, message, lands_in, None))
        else:
            lands_in = self._loans.flat(message)
            self._arrivals.append(Arrival(rank, message, None, lands_in))
        self._add(dist.irecv, rank, lands_in, self._tag)

    def send(self, rank: int, message: Message, announced: bool = False, parcel: Parcel | None = None) -> None:
        """Send a message, or the notice of the parcel that holds it."""
        if message.numel == 0 and self._stamp is None:
            return
        if not announced and not self._announces(rank, message):
            self._add(dist.isend, rank, self._loans.written(message), self._tag)
            return
        carrier, number = self._link.carrier, next(self._link.numbers)
        peer = self._link.global_ranks[rank]
        if parcel is None and carrier is not None and peer in carrier.peers:
            parcel = carrier.write([peer], message)
        place = BY_GLOO if parcel is None else parcel.start
        notice = [place, message.num_bytes, number, *(self._stamp or (0, 0))]
        self._add(dist.isend, rank, torch.tensor(notice, device="cpu"), self._tag)
        if parcel is None and message.numel:
            self._add(dist.isend, rank, self._loans.written(message), tag=number)

    def post(self) -> None:
        if self._ops:
            with named(f"post {self.purpose}"):
                self._works = self._link.post(self._ops, self.purpose)
            self._ops = []

    @classmethod
    def post_receives_first(cls, batches: "Sequence[Batch]") -> None:
        """Post batches over one link together: what is received, then what is sent."""
        first = [(batch, op) for batch in batches for op in batch._ops[: len(batch._arrivals)]]
        ops = first + [(batch, op) for batch in batches for op in batch._ops[len(batch._arrivals) :]]
        if not ops:
            return
        with named(f"post {batches[0].purpose}"):
            works = batches[0]._link.post([op for _, op in ops], batches[0].purpose)
        for (batch, _), work in zip(ops, works, strict=True):
            batch._works.append(work)
        for batch in batches:
            batch._ops = []

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
        self._loans.give_back()

    def _release(self, notices: list[list[int] | None]) -> None:
        """Tell peers that what they have in shared memory for this rank has been read."""
        for arrival, notice in zip(self._arrivals, notices):
            if notice is not None and notice[0] != BY_GLOO and self._link.carrier is not None:
                self._link.carrier.release(self._link.global_ranks[arrival.rank], notice[0])

    def _check_stamps(self, notices: list[list[int] | None]) -> None:
        if self._check is None:
            return
        own = self._stamp
        assert own is not None, "a stamp of its own is what this rank's is compared with"
        told = ((arrival.rank, notice) for arrival, notice in zip(self._arrivals, notices) if notice is not None)
        stamps = {rank: (notice[3], notice[4]) for rank, notice in told}
        self._check([stamps.get(rank, own) for rank in range(self._link.size)])

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
            landing = self._loans.flat(message)
            work = dist.irecv(landing, peer, self._link.group, tag=number)
            self._await([Work(work, [arrival.rank], [landing])])
        if message.in_place is None and landing is not None:
            message.read(landing)

    def _await(self, works: Iterable[Work]) -> None:
        for work, ranks, tensors in works:
            with self._link.naming(self.purpose, ranks):
                wait_for(work, tensors[0].device)

    def _announces(self, rank: int, message: Message) -> bool:
        carrier = self._link.carrier
        return self._stamp is not None or (
            carrier is not None and carrier.carries(self._link.global_ranks[rank], message.device, message.num_bytes)
        )

    def _add(self, op: Callable[..., Any], rank: int, tensor: torch.Tensor, tag: int) -> None:
        self._ops.append(Posted(op, tensor, rank, tag))
