"""The keys and values of a step as its blocks read them, and from the blocks' gradients those of what travelled.

Keys and values that travelled themselves are read directly. With an expansion, keys and values are computed once for
the rows that some block of the step needs, and freed after the last block that reads them.
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
        single: whether at most one partial gradient is added, for the whole batch.
    """

    def __init__(self, rows: Pair, tasks: Sequence[Task]) -> None:
        self._key, self._value = rows
        self.single = not tasks or (len(tasks) == 1 and tasks[0].is_whole)

    def read(self, keys: slice, batch: slice) -> Pair:
        """(key, value) of a block."""
        return self._key[keys, batch], self._value[keys, batch]

    def done(self, keys: slice, batch: slice) -> None:
        """Called in the forward pass after the block was computed."""

    def add(self, partial: KVPartial, keys: slice, batch: slice, grads: Sequence[torch.Tensor]) -> None:
        """Called in the backward pass with the block's gradients of its keys and values."""
        partial.add(keys, batch, grads)


@dataclass(eq=False)
class _Part:
    """Contiguous rows of one step, and the blocks that read them.

    Args:
        start, stop: rows of the shard. batch: rows of the batch. left: number of blocks that are not computed yet.
        made: their keys and values, while needed. grads: the gradients of these so far.
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
    """Rows from which keys and values are computed by an expansion.

    Args:
        rows: the tensors that travelled. expansion: for this rank's heads. order: the kernel's memory order.
        sums: sums of the gradients of the expansion's parameters, in a backward pass.
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
        """Add a block's gradients; those of a single block that covers the part are used without a copy."""
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
    """Rows of the batch -> the ascending, disjoint parts that their blocks read."""
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
