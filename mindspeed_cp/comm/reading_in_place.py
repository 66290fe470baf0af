"""Keys and values that every rank of a ring reads where they are, if all of them share memory.

In each pass, a rank writes its shard once into memory that its peers see. Nothing is forwarded, and the readers make no
copies: blocks are computed with the shard in the sender's memory, and the sender reuses the place after its last reader
has finished. Steps, their order, and the counted bytes are those of the exchange.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.comm.batch import BY_GLOO, CPU, Batch
from mindspeed_cp.comm.channel import RingChannel, Stream, Tensors
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.messages import Message, Pending, as_stored, end_to_end, flat_memory
from mindspeed_cp.comm.meter import record, wait_for
from mindspeed_cp.comm.notices import Notice

LENT = (1 << 30) + 1  # tag of notices of lent messages, which are independent of all others


class Reading(NamedTuple):
    """A step: rows start to stop of the shard of ring rank ``source``.

    Args:
        is_read: whether a block needs them.
        num_sent: rows that this rank sends in this step by the exchange's own count.
    """

    source: int
    start: int
    stop: int
    is_read: bool
    num_sent: int


def can_read_in_place(channel: RingChannel, own: Tensors) -> bool:
    """Whether all ranks of the ring share memory and shards are large enough for it; the same on all ranks."""
    largest = max(channel.lengths) * sum(tensor.shape[1:].numel() for tensor in own) * own[0].element_size()
    return channel.link.shares_memory(own[0].device, largest)


def read_in_place(
    channel: RingChannel, own: Tensors, purpose: str, steps: Sequence[Reading], readers: Sequence[int]
) -> Stream:
    """Yield ``own``, then the rows of each step, which are valid until the caller asks for the next step.

    Args:
        readers: of this rank's shard.
    """
    link, counted = channel.link, purpose.partition(".")[0]
    flat = flat_memory([as_stored(tensor, channel.order) for tensor in own])
    assert flat is not None, "own rows are packed"
    lent = _lend(link, flat, readers, counted)
    last = {step.source: number for number, step in enumerate(steps) if step.is_read}
    widths = [tensor.shape[1:] for tensor in own]
    size_of_row = sum(width.numel() for width in widths)
    borrowed = {
        source: Borrowed.expect(link, source, channel.lengths[source] * size_of_row, flat.dtype, counted)
        for source in last
    }
    yield own
    shards: dict[int, Tensors] = {}
    for number, step in enumerate(steps):
        if step.num_sent:
            record({counted: step.num_sent * size_of_row * flat.element_size()})
        if not step.is_read:
            yield own  # nothing is read of it
            continue
        if step.source not in shards:
            shapes = [(channel.lengths[step.source], *width) for width in widths]
            shards[step.source] = end_to_end(borrowed[step.source].wait(), shapes, channel.order)
        yield tuple(tensor[step.start : step.stop] for tensor in shards[step.source])
        if last[step.source] == number:
            del shards[step.source]
            borrowed.pop(step.source).give_back()
    lent.wait()


def _lend(link: Link, flat: torch.Tensor, readers: Sequence[int], purpose: str) -> Pending[None]:
    """Let these ranks read a message; ``flat`` may change after ``wait``."""
    assert link.carrier is not None, "the readers share memory"
    batch, message = Batch(link, purpose, tag=LENT), Message(((flat,),), flat.dtype)
    if readers and message.numel:
        parcel = link.carrier.lend(link.stream(LENT), [link.global_ranks[rank] for rank in readers], message)
        for rank in readers:
            batch.send(rank, message, announced=True, parcel=parcel)
    Batch.post(batch)
    return Pending(batch.finish)


@dataclass(eq=False)
class Borrowed:
    """A peer's message that is read in the peer's memory; if there was no room in it, gloo carries the message."""

    link: Link
    rank: int
    numel: int
    dtype: torch.dtype
    purpose: str
    notice: Notice

    @classmethod
    def expect(cls, link: Link, rank: int, numel: int, dtype: torch.dtype, purpose: str) -> "Borrowed":
        assert link.carrier is not None, "the peer shares memory"
        notice = link.carrier.notices.expect(link.global_ranks[rank], link.stream(LENT))
        return cls(link, rank, numel, dtype, purpose, notice)

    def wait(self) -> torch.Tensor:
        """The message, flat, until ``give_back``.

        Raises:
            RuntimeError: the peer is lost, or sent another size.
        """
        peer, carrier = self.link.global_ranks[self.rank], self.link.carrier
        assert carrier is not None
        with self.link.naming(self.purpose, [self.rank]):
            wait_for(self.notice, CPU)
            place, num_bytes, number, *_ = self.notice.numbers
            if num_bytes != self.numel * self.dtype.itemsize:
                raise RuntimeError(f"rank {peer} lent {num_bytes} bytes, not {self.numel * self.dtype.itemsize}")
            if place != BY_GLOO:
                return carrier.read(peer, place, num_bytes).view(self.dtype)
            landing = torch.empty(self.numel, dtype=self.dtype, device=CPU)
            wait_for(dist.irecv(landing, peer, self.link.group, tag=number), CPU)
        return landing

    def give_back(self) -> None:
        place, carrier = self.notice.numbers[0], self.link.carrier
        if place != BY_GLOO and carrier is not None:
            carrier.release(self.link.global_ranks[self.rank], place)


def of_ring(channel: RingChannel) -> Iterator[Reading]:
    """The steps of a (double) ring, which forwards the previous step's shard or the window's first."""
    steps, window = list(channel.place.steps()), channel.place.window
    for before, after in zip(steps, steps[1:]):
        head = steps[before.window * window]
        leaving = head if after.place == 0 or channel.in_flight > 1 else before
        assert after.source is not None and leaving.source is not None
        rows = channel.lengths[after.source]
        yield Reading(after.source, 0, rows, rows > 0, channel.lengths[leaving.source])


def of_direct(channel: RingChannel) -> Iterator[Reading]:
    """The steps of the direct exchange; each peer reads the rows that it needs."""
    rank, size = channel.place.rank, len(channel.lengths)
    for t, piece in channel.order_of_pieces:
        reader, source = (rank + t) % size, (rank - t) % size
        sent = sum(stop - start for start, stop in channel.needed(reader, rank, piece))
        yield Reading(source, *channel.pieces[source][piece], bool(channel.needed(rank, source, piece)), sent)


def of_gather(channel: RingChannel) -> Iterator[Reading]:
    """The steps of the all-gather, which sends everything at once."""
    rank, size = channel.place.rank, len(channel.lengths)
    for t in range(1, size):
        source = (rank - t) % size
        rows = channel.lengths[source]
        yield Reading(source, 0, rows, rows > 0, max(channel.lengths) * (size - 1) if t == 1 else 0)
