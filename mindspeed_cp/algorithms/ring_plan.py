"""Which blocks every ring rank computes against every shard, and which rows of the shard it needs for that."""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from mindspeed_cp.blocks import Block, IntervalMask, needed_rows, plan_blocks

Runs = tuple[tuple[int, int], ...]
ALL = slice(None)


class Task(NamedTuple):
    """A block, computed for the rows ``batch`` of the batch."""

    batch: slice
    block: Block

    @property
    def is_whole(self) -> bool:
        """Whether it is for the whole batch."""
        return self.batch == ALL


@dataclass(frozen=True)
class RingPlan:
    """The plan of one attention call.

    Args:
        runs: per ring rank, the runs of global positions that it holds.
        masks: one for all rows of the batch, or one for each.
        native_bands: the kernel computes bands itself.
        dense: a dense mask comes on top; it makes one rectangle of all blocks.
        exact: only needed rows travel; else whole shards, where any row is needed.
    """

    runs: tuple[Runs, ...]
    masks: tuple[IntervalMask, ...]
    native_bands: bool
    dense: bool = False
    exact: bool = False

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of every ring rank's shard."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @cached_property
    def _batches(self) -> list[tuple[slice, IntervalMask]]:
        """Neighbouring rows of the batch with one mask, and that mask."""
        if len(set(self.masks)) == 1:
            return [(ALL, self.masks[0])]
        batches, start = [], 0
        for mask, rows in groupby(self.masks):
            stop = start + len(list(rows))
            batches.append((slice(start, stop), mask))
            start = stop
        return batches

    def tasks(self, reader: int, source: int) -> tuple[Task, ...]:
        """The blocks of ``reader``'s queries against ``source``'s keys."""
        tasks = tuple(
            Task(batch, block)
            for batch, mask in self._batches
            for block in plan_blocks(self.runs[reader], self.runs[source], mask, self.native_bands)
        )
        if self.dense and tasks:
            return (Task(ALL, Block((0, self.lengths[reader]), (0, self.lengths[source]))),)
        return tasks

    def rows_needed(self, reader: int, source: int) -> Runs:
        """Rows of ``source``'s shard to move to ``reader`` (and gradients back), for any row of the batch."""
        if not self.exact:
            return ((0, self.lengths[source]),) if self.tasks(reader, source) else ()
        needed = [needed_rows(self.runs[reader], self.runs[source], mask) for _, mask in self._batches]
        return needed[0] if len(needed) == 1 else _union(needed)


def _union(rows: list[Runs]) -> Runs:
    """Ascending disjoint (start, stop) that cover all of these."""
    united: list[tuple[int, int]] = []
    for start, stop in sorted(span for spans in rows for span in spans):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(stop, united[-1][1])
        else:
            united.append((start, stop))
    return tuple(united)
