"""How keys and values reach a rank: forwarded around a (double) ring, sent directly, or gathered at once.

Each exchange is a generator over steps: it yields (source, rows), own rows first, and moves the data for later steps
around the yield, where the caller computes. Rows are a tuple of tensors (seq, batch, kv_heads, dim), key and value or
either of them. They travel in one message, all rows of the key before those of the value, in the order of
memory that the kernel asks for, so that it need not copy: the rank that has them does so once for all.

With ``overlap`` a transfer is posted before the block that hides it and awaited after it; without, it is posted after
the block and awaited at once. In both cases the first local block starts before any wait.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.messages import Pending, as_stored, end_to_end, flat_memory
from mindspeed_cp.comm.schedule import RingPlace
from mindspeed_cp.kernels.base import MemoryOrder

Rows = tuple[tuple[int, int], ...]
Tensors = tuple[torch.Tensor, ...]
Stream = Iterator[tuple[int, Tensors]]


@dataclass(frozen=True)
class RingChannel:
    """What every exchange needs to know of the ring.

    Args:
        place: this rank's place in it.
        link: over the ring; unused where it has one rank.
        outer: a link for transfers between windows; unused without.
        lengths: rows of every ring rank's shard.
        rows_needed: (query rank, source rank) -> ((start, stop), ...), the rows of the source's shard that are wanted.
        overlap: post transfers before the block that hides them.
        order: of the memory of keys and values on their way; their gradients return contiguous.
    """

    place: RingPlace
    link: Link
    outer: Link
    lengths: tuple[int, ...]
    rows_needed: Callable[[int, int], Rows]
    overlap: bool
    order: MemoryOrder | None = None

    def buffer(
        self, name: str, like: Tensors, source: int, keep: bool = False, order: MemoryOrder | None = None
    ) -> Tensors:
        """A buffer for the shard of ``source``: fresh when it is kept for the backward pass, else from the
        workspace.
        """
        shapes = [(self.lengths[source], *tensor.shape[1:]) for tensor in like]
        count, first = sum(map(math.prod, shapes)), like[0]
        flat = first.new_empty(count) if keep else self.link.workspace.get(name, (count,), first.dtype, first.device)
        return end_to_end(flat, shapes, order)


def ring_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """Forward whole shards around the (double) ring.

    A buffer is received into only after everything sent from it has left: two inner and two outer buffers take turns.
    The transfer to the next window starts with the inner ring, so that the whole inner ring hides it.
    """
    place = channel.place

    def pass_on(rows, outer, inner, link, name, source):
        received = channel.buffer(f"{purpose}.{name}", own, source, keep, channel.order)
        leaving, arriving = ([as_stored(tensor, channel.order) for tensor in shard] for shard in (rows, received))
        pending = link.exchange(
            [(place.peer(outer, inner), leaving)], [(place.peer(-outer, -inner), arriving)], purpose
        )
        return pending, received

    def to_next_window(rows, j):
        return pass_on(rows, 1, 0, channel.outer, f"outer{j % 2}", place.peer(-j - 1, 0))

    def within_window(rows, j, t):
        return pass_on(rows, 0, 1, channel.link, f"inner{t % 2}", place.peer(-j, -t - 1))

    head = own
    for j in range(place.windows):
        last_window = j + 1 == place.windows
        crossing = to_next_window(head, j) if channel.overlap and not last_window else None
        rows = head
        for t in range(place.window):
            last_step = t + 1 == place.window
            step = within_window(rows, j, t) if channel.overlap and not last_step else None
            yield place.peer(-j, -t), rows
            if not last_step:
                pending, rows = step or within_window(rows, j, t)
                pending.wait()
        if not last_window:
            pending, head = crossing or to_next_window(head, j)
            pending.wait()


def direct_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """At step t every rank sends to rank r + t exactly the rows that its blocks need, from its own memory.

    Nothing is forwarded. Rows that nobody asked for are left undefined in the receive buffer. Transfers run one step
    ahead of the computation.
    """
    rank, ring_size = channel.place.rank, len(channel.lengths)

    def fetch(t):
        reader, source = (rank + t) % ring_size, (rank - t) % ring_size
        received = channel.buffer(f"{purpose}.direct{t % 2}", own, source, keep, channel.order)
        pending = channel.link.exchange(
            [(reader, parts(own, channel.rows_needed(reader, rank), channel.order))],
            [(source, parts(received, channel.rows_needed(rank, source), channel.order))],
            purpose,
        )
        return pending, received

    rows = own
    for t in range(ring_size):
        ahead = fetch(t + 1) if channel.overlap and t + 1 < ring_size else None
        yield (rank - t) % ring_size, rows
        if t + 1 < ring_size:
            pending, rows = ahead or fetch(t + 1)
            pending.wait()


def allgather_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """Gather every shard with one collective."""
    rank, ring_size = channel.place.rank, len(channel.lengths)
    widths = [tensor.shape[1:] for tensor in own]
    sizes = [rows * sum(width.numel() for width in widths) for rows in channel.lengths]

    def gather():
        flat = flat_memory([as_stored(tensor, channel.order) for tensor in own])
        assert flat is not None, "own rows are packed"
        return channel.link.gather(flat, sizes, purpose, None if keep else f"{purpose}.gathered")

    pending = gather() if channel.overlap else None
    yield rank, own
    shards = (pending or gather()).wait()
    for t in range(1, ring_size):
        source = (rank - t) % ring_size
        shapes = [(channel.lengths[source], *width) for width in widths]
        yield source, end_to_end(shards[source], shapes, channel.order)


EXCHANGES = {"ring": ring_exchange, "direct": direct_exchange, "allgather": allgather_exchange}


def parts(rows: Tensors, ranges: Rows, order: MemoryOrder | None = None) -> list[torch.Tensor]:
    """Views of these (start, stop) of the rows; they travel in one message, each in this order of memory."""
    return [as_stored(tensor[start:stop], order) for tensor in rows for start, stop in ranges]


class GradientReturn:
    """Brings partial gradients of keys and values back to their owners, whatever brought the keys and values here.

    A partial goes straight to the rank of this window that held the shard first (inner step 0), which sums in the
    accumulation dtype; the window's sum crosses windows once, to the owner. Each partial is so rounded once to the wire
    dtype, and once more when it crosses windows. Without windows the first holder is the owner.

    Use: in window j, ``begin(j)`` gives the buffer of inner step 0 and ``wire(t, source)`` one for step t > 0;
    ``send(j, t, leaving)`` takes its needed rows; ``end(j)`` closes the window; ``finish`` returns the sum for the own
    rows.
    """

    def __init__(self, channel: RingChannel, own: Tensors, like: Tensors) -> None:
        """own: accumulators for this rank's rows, which step 0 fills; like: tensors with the wire dtype."""
        self._channel, self._own, self._like = channel, own, like
        self._window_sum = own
        self._inner: Pending[None] | None = None
        self._outer: Pending[None] | None = None

    def begin(self, j: int) -> Tensors:
        """The accumulators that the partial of inner step 0 of window j is to be written into."""
        if j > 0:
            self._window_sum = self._channel.buffer("dkv.window", self._own, self._channel.place.peer(-j, 0))
        return self._window_sum

    def wire(self, t: int, source: int) -> Tensors:
        """A buffer for the partial of inner step t > 0, in the wire dtype."""
        return self._channel.buffer(f"dkv.wire{t % 2}", self._like, source)

    def send(self, j: int, t: int, leaving: Sequence[torch.Tensor]) -> None:
        """Send the partial of inner step t to the first holder of its shard, and take the peer's for the shard held
        first here.

        Args:
            leaving: the rows that this rank needed of the shard, of the key's gradient and then of the value's.
        """
        channel, place = self._channel, self._channel.place
        peer, held = place.peer(0, t), place.peer(-j, 0)
        arriving = parts(self._window_sum, channel.rows_needed(peer, held))
        pending = channel.link.exchange(
            [(place.peer(0, -t), leaving)], [(peer, arriving)], "dkv", add_in=self._like[0].dtype
        )
        self._drain_inner()
        self._inner = pending

    def end(self, j: int) -> None:
        """Close window j: its sum goes to the owner, while the next window is computed."""
        channel, place = self._channel, self._channel.place
        self._drain_inner()
        self._drain_outer()
        if j == 0:
            return
        source, peer = place.peer(-j, 0), place.peer(j, 0)
        leaving: Tensors = ()
        if self._window_reads(place.rank, source):
            leaving = channel.buffer("dkv.crossing", self._like, source)
            for wire, total in zip(leaving, self._window_sum):
                wire.copy_(total)
        arriving = self._own if self._window_reads(peer, place.rank) else ()
        self._outer = channel.outer.exchange([(source, leaving)], [(peer, arriving)], "dkv", add_in=self._like[0].dtype)

    def _window_reads(self, member: int, source: int) -> bool:
        """Whether any rank of ``member``'s window has a block against the shard of ``source``."""
        window = self._channel.place.window
        first = member // window * window
        return any(self._channel.rows_needed(reader, source) for reader in range(first, first + window))

    def finish(self) -> Tensors:
        self._drain_inner()
        self._drain_outer()
        return self._own

    def _drain_inner(self) -> None:
        if self._inner is not None:
            self._inner.wait()
        self._inner = None

    def _drain_outer(self) -> None:
        if self._outer is not None:
            self._outer.wait()
        self._outer = None


def paired(*streams: Iterable[tuple[int, Tensors]]) -> Stream:
    """Streams that run in step as one, each step with the tensors of all."""
    for steps in zip(*streams, strict=True):
        yield steps[0][0], tuple(tensor for _, rows in steps for tensor in rows)
