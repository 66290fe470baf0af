"""Which blocks each ring rank computes against each shard, and which rows of the shard it needs for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np

from mindspeed_cp.sequence.blocks import Block, needed_rows, plan_blocks
from mindspeed_cp.sequence.cache import INT_BYTES, RUN_BYTES, kept_up_to
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import Runs, end_to_end, length, offsets, take, union
from mindspeed_cp.sequence.slice_mask import SliceMask
from mindspeed_cp.sequence.staircases import stretches

ALL = slice(None)
# Number of counts (32 MiB); layouts that cut every document have many runs, and then most ranks are related anyway.
LARGEST_TABLE = 1 << 22
TASK_INTS = 12  # size of a task without its offsets, in ints


class Task(NamedTuple):
    """A block to be computed for the rows ``batch`` of the batch."""

    batch: slice
    block: Block

    @property
    def is_whole(self) -> bool:
        """Whether it is for the whole batch."""
        return self.batch == ALL

    def covers(self, num_queries: int, num_keys: int) -> bool:
        """Whether it covers this number of queries and keys, and the whole batch."""
        rows = self.block.query_rows, self.block.key_rows
        return self.is_whole and rows == (slice(0, num_queries), slice(0, num_keys))


@dataclass(frozen=True, eq=False)
class RingPlan:
    """The plan for all attention calls of a batch; made by ``ring_plan``. Results are cached.

    Args:
        layout: which positions each ring rank holds.
        masks: one for all rows of the batch, or one per row.
        native_bands: whether the kernel computes bands itself.
        dense: whether there is also a dense mask; all blocks are then one rectangle.
        exact: whether only needed rows travel; else whole shards, if any row is needed.
    """

    layout: SequenceLayout
    masks: tuple[SliceMask, ...]
    native_bands: bool
    dense: bool = False
    exact: bool = False
    _tasks: dict[tuple[int, int, int | None], tuple[Task, ...]] = field(default_factory=dict, repr=False)
    _needed: dict[tuple[int, int], Runs] = field(default_factory=dict, repr=False)
    _areas: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    _weighed: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of every ring rank's shard."""
        return tuple(self.layout.ring_length(rank) for rank in range(self.layout.ring_size))

    @cached_property
    def wholes(self) -> tuple[Runs, ...]:
        """Every ring rank's shard in one piece."""
        return tuple(((0, rows),) for rows in self.lengths)

    @cached_property
    def halves(self) -> tuple[Runs, ...]:
        """Every ring rank's shard in two pieces: cut at the start of a run nearest to the middle, or in the middle of a
        single run. One piece if every shard is a single run: then both directions of a link carry equal amounts.
        """
        runs = self.layout.rings
        if all(len(own) <= 1 for own in runs):
            return self.wholes
        return tuple(end_to_end((cut, rows - cut)) for cut, rows in zip(map(_middle, runs), self.lengths))

    @cached_property
    def _batches(self) -> list[tuple[slice, SliceMask]]:
        """Consecutive rows of the batch with the same mask, and that mask."""
        if len(set(self.masks)) == 1:
            return [(ALL, self.masks[0])]
        batches, start = [], 0
        for mask, rows in groupby(self.masks):
            stop = start + len(list(rows))
            batches.append((slice(start, stop), mask))
            start = stop
        return batches

    def tasks(self, reader: int, source: int, half: int | None = None) -> tuple[Task, ...]:
        """The blocks of ``reader``'s queries against ``source``'s keys, or against those of one of ``source``'s
        ``halves``; rows of the keys count from its first.
        """
        place = reader, source, half
        if place not in self._tasks:
            keys = self.layout.ring_runs(source)
            keys = keys if half is None else take(keys, *self.halves[source][half])
            self._tasks[place] = self.tasks_against(reader, keys) if self._related[reader, source] else ()
        return self._tasks[place]

    def tasks_against(self, reader: int, keys: Runs) -> tuple[Task, ...]:
        """The blocks of ``reader``'s queries against keys at any ascending positions."""
        queries = self.layout.ring_runs(reader)
        tasks = tuple(
            Task(batch, block)
            for batch, mask in self._batches
            for block in plan_blocks(queries, keys, mask, self.native_bands)
        )
        if self.dense and tasks:
            return (Task(ALL, Block((0, self.lengths[reader]), (0, length(keys)))),)
        return tasks

    def area(self, reader: int, num_rows: int) -> int:
        """Number of (query, key) pairs that ``reader`` computes per head for a batch of ``num_rows`` rows."""
        if (reader, num_rows) not in self._areas:
            self._areas[reader, num_rows] = sum(
                task.block.area * len(range(num_rows)[task.batch])
                for source in range(self.layout.ring_size)
                for task in self.tasks(reader, source)
            )
        return self._areas[reader, num_rows]

    @cached_property
    def _related(self) -> np.ndarray:
        """Bool (ranks, ranks): whether queries of one rank are in a slice with keys of the other. With thousands of
        documents most pairs are not, and need no plan.
        """
        runs = self.layout.rings
        related = np.zeros((len(runs), len(runs)), dtype=bool)
        if sum(map(len, runs)) * len(runs) > LARGEST_TABLE:
            return ~related
        for mask in set(self.masks):
            related |= sharing_slices(runs, mask)
        return related

    def rows_needed(self, reader: int, source: int) -> Runs:
        """Rows of ``source``'s shard to send to ``reader`` (and gradients back), needed for any row of the batch."""
        if not self.exact:
            return ((0, self.lengths[source]),) if self.tasks(reader, source) else ()
        if not self._related[reader, source]:
            return ()
        if (reader, source) not in self._needed:
            queries, keys = self.layout.ring_runs(reader), self.layout.ring_runs(source)
            needed = [needed_rows(queries, keys, mask) for _, mask in self._batches]
            self._needed[reader, source] = union(*needed)
        return self._needed[reader, source]

    @property
    def num_bytes(self) -> int:
        """Approximate bytes that it holds now: offsets of blocks, rows that travel, and its arguments."""
        answers = len(self._tasks), len(self._needed)
        if answers not in self._weighed:
            self._weighed.clear()
            self._weighed[answers] = self._weigh()
        return self._weighed[answers]

    def _weigh(self) -> int:
        offsets = sum(
            len(task.block.q_offsets) + len(task.block.k_offsets) + TASK_INTS
            for tasks in self._tasks.values()
            for task in tasks
        )
        runs = sum(map(len, self._needed.values())) + 3 * sum(map(len, self.layout.all_runs))
        return INT_BYTES * offsets + RUN_BYTES * runs + sum(mask.num_bytes for mask in self.masks)

    @cached_property
    def exchanges(self) -> bool:
        """Whether any rank may need rows of another; the same on all ranks."""
        return bool((self._related & ~np.eye(len(self.lengths), dtype=bool)).any())

    @cached_property
    def direct_sends_less(self) -> bool:
        """Whether some rank needs only part of another's shard, so that sending only needed rows saves bytes."""
        ranks = range(self.layout.ring_size)
        return any(
            length(self.rows_needed(reader, source)) < self.lengths[source]
            for reader in ranks
            for source in ranks
            if reader != source
        )


def _middle(runs: Runs) -> int:
    """The number of rows before the start of a run nearest to the middle; before the middle of a single run."""
    ends = offsets(stop - start for start, stop in runs)
    return min(ends[1:-1], key=lambda end: abs(2 * end - ends[-1]), default=ends[-1] // 2)


def _num_bytes(plan: RingPlan) -> int:
    return plan.num_bytes


@kept_up_to(48 << 20, _num_bytes)
def ring_plan(
    layout: SequenceLayout,
    masks: tuple[SliceMask, ...],
    native_bands: bool,
    dense: bool = False,
    exact: bool = False,
) -> RingPlan:
    """The cached RingPlan of these arguments, for all layers and steps with the same batch shape."""
    return RingPlan(layout, masks, native_bands, dense, exact)


def sharing_slices(runs: Sequence[Runs], mask: SliceMask) -> np.ndarray:
    """Bool (ranks, ranks): whether the first rank holds queries of a slice of which the second holds keys.

    Args:
        runs: runs of every rank; together they are the whole sequence.
    """
    parts = sorted((start, stop, rank) for rank, own in enumerate(runs) for start, stop in own if start < stop)
    start, stop, owner = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    found = stretches(tuple((part[0], part[1]) for part in parts), mask)
    reader = owner[np.searchsorted(start, found.start, side="right") - 1]
    first = np.searchsorted(stop, np.maximum(found.low, found.start + found.lower), side="right")
    last = np.searchsorted(start, np.minimum(found.high, found.stop + found.upper), side="left")
    met = np.zeros((len(runs), len(runs)), dtype=bool)
    within = last == first + 1
    met[reader[within], owner[first[within]]] = True
    reader, first, last = reader[~within], first[~within], last[~within]
    # Number of parts that each rank has before every part; it grows over a stretch's keys if the rank holds any.
    before = np.zeros((len(parts) + 1, len(runs)), dtype=np.int32)
    np.cumsum(owner[:, None] == np.arange(len(runs)), axis=0, out=before[1:])
    step = max(LARGEST_TABLE // len(runs), 1)
    for some in range(0, len(reader), step):
        rows = slice(some, some + step)
        np.logical_or.at(met, reader[rows], before[last[rows]] > before[first[rows]])
    return met
