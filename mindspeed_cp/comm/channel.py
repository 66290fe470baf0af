"""What every exchange of keys and values needs to know about the ring, and the loop that overlaps computation."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.messages import Pending, as_stored, end_to_end
from mindspeed_cp.comm.schedule import RingPlace
from mindspeed_cp.kernels.base import MemoryOrder

Rows = tuple[tuple[int, int], ...]
Tensors = tuple[torch.Tensor, ...]
Stream = Iterator[Tensors]
UnderWay = tuple[Pending[None], Tensors]  # a step's transfer, and the tensors into which it receives


@dataclass(frozen=True)
class MeshStep:
    """One step of the mesh exchange, seen from one rank: a slice of every shard, limited to the rows that are needed.

    Args:
        leaving: per ring rank, the rows of this rank's shard that are sent to it.
        arriving: per ring rank, the rows of the step that come from it, in the order in which they arrive.
        keys: ascending global positions of the arriving rows; rows of the step are indices into them.
        num_rows: number of arriving rows.
    """

    leaving: tuple[Rows, ...]
    arriving: tuple[Rows, ...]
    keys: Rows
    num_rows: int


@dataclass(frozen=True)
class RingChannel:
    """The ring, as seen by an exchange.

    Args:
        place: this rank's place in it.
        link: over the ring; unused if it has one rank.
        outer: a link for transfers between windows; unused without windows.
        lengths: rows of every ring rank's shard.
        rows_needed: (query rank, source rank) -> ((start, stop), ...), the rows of the source's shard that are needed.
        overlap: whether transfers are posted before the block that hides them.
        order: memory order of keys and values during transfers; their gradients are contiguous.
        in_flight: steps that may be in flight at once, if nothing is forwarded.
        mesh: the steps of the mesh exchange after the first, which is the rank's own shard.
        pieces: (start, stop) of the pieces of each ring rank's shard, the same number for all. Pieces are sent and
            computed one after the other, so that a link carries gradients of the first with the second.
    """

    place: RingPlace
    link: Link
    outer: Link
    lengths: tuple[int, ...]
    rows_needed: Callable[[int, int], Rows]
    overlap: bool
    order: MemoryOrder | None = None
    in_flight: int = 1
    mesh: tuple[MeshStep, ...] = ()
    pieces: tuple[Rows, ...] = ()

    @property
    def num_pieces(self) -> int:
        return len(self.pieces[self.place.rank])

    @cached_property
    def order_of_pieces(self) -> tuple[tuple[int, int], ...]:
        """(step of a window, piece) without the window's first step. Steps in flight together use different links, so
        their first pieces all come before their second ones.
        """
        steps = range(1, self.place.window)
        groups = [steps[start : start + self.in_flight] for start in range(0, len(steps), self.in_flight)]
        return tuple((step, piece) for group in groups for piece in range(self.num_pieces) for step in group)

    def needed(self, reader: int, source: int, piece: int) -> Rows:
        """The rows of a piece of the source's shard that ``reader`` needs, relative to the piece."""
        rows = self.rows_needed(reader, source)
        if self.num_pieces == 1:
            return rows
        first, last = self.pieces[source][piece]
        return tuple((max(a, first) - first, min(b, last) - first) for a, b in rows if a < last and b > first)

    def rows_in(self, source: int, piece: int) -> int:
        """Rows of a piece."""
        start, stop = self.pieces[source][piece]
        return stop - start

    def buffer(
        self, name: str, like: Tensors, num_rows: int, keep: bool = False, order: MemoryOrder | None = None
    ) -> Tensors:
        """A buffer of ``num_rows`` rows: new memory if it is kept for the backward pass, else from the workspace."""
        shapes = [(num_rows, *tensor.shape[1:]) for tensor in like]
        count, first = sum(map(math.prod, shapes)), like[0]
        flat = first.new_empty(count) if keep else self.link.workspace.get(name, (count,), first.dtype, first.device)
        return end_to_end(flat, shapes, order)


def run_ahead(
    channel: RingChannel,
    num_steps: int,
    own: Tensors,
    fetch: Callable[[range, Tensors], list[UnderWay]],
    pieces: int = 1,
) -> Stream:
    """Yield ``own``, then the rows of each further step.

    With ``overlap``, up to ``in_flight`` steps are posted before the block that hides them, else after it. A step is
    awaited after the previous block has been computed.

    Args:
        fetch: (steps, rows used for computation now) -> the posted transfers of the steps.
        pieces: that make one of the steps that may be in flight.
    """
    under_way: deque[UnderWay] = deque()
    ahead = channel.in_flight * pieces

    def post(now: int, rows: Tensors) -> None:
        steps = range(now + len(under_way) + 1, min(now + ahead + 1, num_steps))
        if steps:
            under_way.extend(fetch(steps, rows))

    rows = own
    for step in range(num_steps):
        if channel.overlap:
            post(step, rows)
        yield rows
        post(step, rows)
        if under_way:
            pending, rows = under_way.popleft()
            pending.wait()


def parts(rows: Iterable[torch.Tensor], ranges: Rows, order: MemoryOrder | None = None) -> list[torch.Tensor]:
    """Views of these (start, stop) ranges of the rows, each in this memory order, for one message."""
    return [as_stored(tensor[start:stop], order) for tensor in rows for start, stop in ranges]


def paired(*streams: Iterable[Tensors]) -> Stream:
    """Combine streams that run in step to one, each of whose steps has the tensors of all."""
    for steps in zip(*streams, strict=True):
        yield tuple(tensor for rows in steps for tensor in rows)
