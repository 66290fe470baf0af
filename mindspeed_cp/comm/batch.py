"""Messages between single ranks that are posted together, at most one for each peer and direction.

HCCL's batch of sends and receives allows only one for the same rank, and cannot be used with virtual pipeline stages:
there a link posts its messages one by one, in the order of ``turn``. If a message is in shared memory, or has a stamp,
a notice is sent first, through a pipe (``comm.notices``) or gloo ::

    address in the sender's memory, or BY_GLOO | bytes | number, the tag of the following gloo message | stamp
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from mindspeed_cp.comm.host_memory import Parcel
from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.meter import named, wait_for
from mindspeed_cp.comm.notices import NUMBERS, Notice, Notices, Numbers
from mindspeed_cp.comm.posting import Loans, Member, Posted, Work

Stamp = tuple[int, int]
CPU = torch.device("cpu")
BY_GLOO = -1  # instead of an address: the message follows its notice through gloo


@dataclass(frozen=True, eq=False)
class Arrival:
    """A message expected from a rank: received into flat memory, or announced by a notice.

    Args:
        notice: notice from a pipe, or the tensor into which gloo receives it.
        landing: the flat memory; None with a notice.
    """

    rank: int
    message: Message
    notice: Notice | torch.Tensor | None
    landing: torch.Tensor | None

    @property
    def told(self) -> Numbers | None:
        """The notice's numbers, once it has arrived."""
        if self.notice is None:
            return None
        return self.notice.numbers if isinstance(self.notice, Notice) else tuple(self.notice.tolist())


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
        link.check_uninterrupted()
        self._tag = tag
        self._link, self.purpose, self._stamp, self._check = link, purpose.partition(".")[0], stamp, check
        self._arrivals: list[Arrival] = []
        # Receives come first, because a notice may require another receive before the sends end.
        self._receives: list[Posted] = []
        self._sends: list[Posted] = []
        self._told: list[tuple[int, Numbers]] = []  # (rank, its notice)
        self._awaited: list[Work] = []  # notices expected through pipes
        self._works: list[Work] = []
        self._loans = Loans(link.workspace)

    def receive(self, rank: int, message: Message, announced: bool = False) -> None:
        """Expect a message from ``rank``; ``finish`` unpacks it into its tensors."""
        if message.numel == 0 and self._stamp is None:
            return
        pipes, peer = self._pipes_to(rank), self._link.global_ranks[rank]
        notice: Notice | torch.Tensor | None = None
        landing: torch.Tensor | None = None
        if not announced and not self._announces(rank, message):
            landing = self._loans.flat(message)
        elif pipes is None:
            notice = torch.empty(NUMBERS, dtype=torch.int64, device="cpu")
        else:
            notice = pipes.expect(peer, self._link.stream(self._tag))
            self._awaited.append(Work(notice, (rank,), ()))
        lands_in = notice if isinstance(notice, torch.Tensor) else landing
        if lands_in is not None:
            self._receives.append(Posted(dist.irecv, lands_in, rank, self._tag))
        self._arrivals.append(Arrival(rank, message, notice, landing))

    def send(self, rank: int, message: Message, announced: bool = False, parcel: Parcel | None = None) -> None:
        """Send a message, or the notice of the parcel that contains it."""
        if message.numel == 0 and self._stamp is None:
            return
        if not announced and not self._announces(rank, message):
            self._sends.append(Posted(dist.isend, self._loans.written(message), rank, self._tag))
            return
        pipes, carrier = self._pipes_to(rank), self._link.carrier
        if parcel is None and pipes is not None and carrier is not None:
            parcel = carrier.write([self._link.global_ranks[rank]], message)
        number = next(self._link.numbers) if parcel is None else 0
        place = BY_GLOO if parcel is None else parcel.start
        notice = (place, message.num_bytes, number, *(self._stamp or (0, 0)))
        if pipes is None:
            self._sends.append(Posted(dist.isend, torch.tensor(notice, device="cpu"), rank, self._tag))
        else:
            self._told.append((rank, notice))
        if parcel is None and message.numel:
            self._sends.append(Posted(dist.isend, self._loans.written(message), rank, number))

    @staticmethod
    def post(*batches: "Batch") -> None:
        """Post batches over one link together: all receives, then all sends."""
        ops = [op for batch in batches for op in batch._receives] + [op for batch in batches for op in batch._sends]
        first = batches[0]
        with named(f"post {first.purpose}"):
            works = first._link.post(ops, first.purpose) if ops else []
            for batch in batches:
                batch._tell()
        if len(batches) == 1:
            first._works = works  # one for each message, or one for the whole batch
            return
        each, num_receives = iter(works), sum(len(batch._receives) for batch in batches)
        assert len(works) == len(ops), "gloo has one for each"
        received, sent = islice(each, num_receives), each
        of_receives = [[*islice(received, len(batch._receives))] for batch in batches]
        for batch, own in zip(batches, of_receives):
            batch._works = own + [*islice(sent, len(batch._sends))]

    def _tell(self) -> None:
        for rank, notice in self._told:
            pipes = self._pipes_to(rank)
            assert pipes is not None
            with self._link.naming(self.purpose, [rank]):
                pipes.tell(self._link.global_ranks[rank], self._link.stream(self._tag), notice)

    def finish(self) -> None:
        """Wait for all posted messages and unpack the received ones."""
        received = len(self._receives)
        self._await(self._works[:received])
        self._await(self._awaited)
        notices = [arrival.told for arrival in self._arrivals]
        try:
            self._check_stamps(notices)
            for arrival, notice in zip(self._arrivals, notices):
                with self._link.naming(self.purpose, [arrival.rank]):
                    self._unpack(arrival, notice)
        finally:
            self._release(notices)
        self._await(self._works[received:])
        self._loans.give_back()

    def _release(self, notices: list[Numbers | None]) -> None:
        """Tell peers that this rank has read its messages in their shared memory."""
        for arrival, notice in zip(self._arrivals, notices):
            if notice is not None and notice[0] != BY_GLOO and self._link.carrier is not None:
                self._link.carrier.release(self._link.global_ranks[arrival.rank], notice[0])

    def _check_stamps(self, notices: list[Numbers | None]) -> None:
        if self._check is None:
            return
        own = self._stamp
        assert own is not None, "a stamp of its own is what this rank's is compared with"
        told = ((arrival.rank, notice) for arrival, notice in zip(self._arrivals, notices) if notice is not None)
        stamps = {rank: (notice[3], notice[4]) for rank, notice in told}
        self._check([stamps.get(rank, own) for rank in range(self._link.size)])

    def _unpack(self, arrival: Arrival, notice: Numbers | None) -> None:
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
                wait_for(work, tensors[0].device if tensors else CPU)

    def _announces(self, rank: int, message: Message) -> bool:
        carrier = self._link.carrier
        return self._stamp is not None or (
            carrier is not None and carrier.carries(self._link.global_ranks[rank], message.device, message.num_bytes)
        )

    def _pipes_to(self, rank: int) -> Notices | None:
        """The pipes for notices to and from a rank; None if gloo sends them."""
        carrier = self._link.carrier
        return carrier.notices if carrier is not None and self._link.global_ranks[rank] in carrier.peers else None
