"""What a step brings, as its blocks read it, and how their gradients become those of what travels.

Keys and values that travel themselves are read as they are. Of rows with an expansion, keys and values are made for the
rows that some block of the step needs, each once, and freed when the last block that reads them is done.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mindspeed_cp.attention.expansion import Expansion, Pair, Sums
from mindspeed_cp.attention.merging import KVPartial
from mindspeed_cp.attention.ring_plan import Task
from mindspeed_cp.kernels.base import MemoryOrder, accumulation_dtype
from mindspeed_cp.kernels.merge import add_in_place
from mindspeed_cp.sequence.runs import union

Ends = tuple[int | None, int | None]  # (start, stop) of rows of the batch


class Arrived:
    """Keys and values that travelled themselves.

    Attributes:
        single: at most one part of the gradient comes, of the whole batch.
    """

    def __init__(self, rows: Pair, tasks: Sequence[Task]) -> None:
        self._key, self._value = rows
        self.single = not tasks or (len(tasks) == 1 and tasks[0].is_whole)

    def read(self, keys: slice, batch: slice) -> Pair:
        """(key, value) of a block."""
        return self._key[keys, batch], self._value[keys, batch]

    def done(self, keys: slice, batch: slice) -> None:
        """The block was computed, in the forward pass."""

    def add(self, partial: KVPartial, keys: slice, batch: slice, grads: Sequence[torch.Tensor]) -> None:
        """The block was computed, in the backward pass, with these gradients of its keys and values."""
        partial.add(keys, batch, grads)


@dataclass(eq=False)
class _Part:
    """Rows of one step that lie end to end, and the blocks that read them.

    Args:
        start, stop: rows of the shard. batch: of the batch. left: blocks that have not been computed.
        made: their keys and values, while they are needed. grads: the gradients of those so far.
    """

    start: int
    stop: int
    batch: slice
    left: int = 0
    made: Pair | None = None
    grads: Sequence[torch.Tensor] = field(default_factory=tuple)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def within(self, keys: slice) -> slice:
        return slice(keys.start - self.start, keys.stop - self.start)


class Expanding:
    """Rows of which keys and values are made.

    Args:
        rows: what travelled. expansion: of the heads that are here. order: of the memory that the kernel asks for.
        sums: of the gradients of the expansion's parameters, in a backward pass.
    """

    def __init__(
        self, rows: Pair, tasks: Sequence[Task], expansion: Expansion, order: MemoryOrder | None, sums: Sums = ()
    ) -> None:
        self._rows, self._expansion, self._order, self._sums = rows, expansion, order, sums
        self._parts = _parts(tasks)
        self.single = not tasks or (tasks[0].is_whole and sum(map(len, self._parts.values())) == 1)

    def read(self, keys: slice, batch: slice) -> Pair:
        part = self._part(keys, batch)
        if part.made is None:
            part.made = self._expansion.expand(self._travelled(part), self._order)
        key, value = part.made
        return key[part.within(keys)], value[part.within(keys)]

    def done(self, keys: slice, batch: slice) -> None:
        part = self._part(keys, batch)
        part.left -= 1
        if not part.left:
            part.made = None

    def add(self, partial: KVPartial, keys: slice, batch: slice, grads: Sequence[torch.Tensor]) -> None:
        part = self._part(keys, batch)
        self._sum_up(part, keys, grads)
        self.done(keys, batch)
        if not part.left:
            d_key, d_value = part.grads
            part.grads = ()
            of_rows = self._expansion.gradients(self._travelled(part), (d_key, d_value), self._sums)
            partial.add(part.rows, part.batch, of_rows)

    def _sum_up(self, part: _Part, keys: slice, grads: Sequence[torch.Tensor]) -> None:
        """The gradients of one block that covers the part are taken as they are; those of several are summed."""
        if not part.grads and part.left == 1:
            part.grads = grads
            return
        if not part.grads:
            assert part.made is not None
            part.grads = tuple(
                torch.zeros(made.shape, dtype=accumulation_dtype(made.dtype), device=made.device) for made in part.made
            )
        for total, grad in zip(part.grads, grads):
            add_in_place(total[part.within(keys)], grad)

    def _travelled(self, part: _Part) -> Pair:
        first, second = self._rows
        return first[part.rows, part.batch], second[part.rows, part.batch]

    def _part(self, keys: slice, batch: slice) -> _Part:
        return _holder(self._parts[batch.start, batch.stop], keys)


def _holder(parts: list[_Part], keys: slice) -> _Part:
    return parts[bisect_right(parts, keys.start, key=lambda part: part.start) - 1]


def _parts(tasks: Sequence[Task]) -> dict[Ends, list[_Part]]:
    """Rows of the batch -> the rows that their blocks read, each once, ascending."""
    read: dict[Ends, list[slice]] = {}
    for batch, block in tasks:
        read.setdefault((batch.start, batch.stop), []).append(block.key_rows)
    found = {}
    for ends, blocks in read.items():
        runs = union((keys.start, keys.stop) for keys in blocks)
        found[ends] = [_Part(start, stop, slice(*ends)) for start, stop in runs]
        for keys in blocks:
            _holder(found[ends], keys).left += 1
    return found
