"""What each step of the mesh exchange brings to a rank, and the blocks that the rank computes with it."""

from dataclasses import dataclass, field
from functools import lru_cache

from mindspeed_cp.attention.ring_plan import ALL, RingPlan, Task
from mindspeed_cp.comm.channel import MeshStep
from mindspeed_cp.sequence.blocks import Block, plan_blocks
from mindspeed_cp.sequence.slices import Piece, in_order, slices


@dataclass(frozen=True, eq=False)
class MeshPlan:
    """The steps of one rank after the one with its own shard; made by ``mesh_plan``.

    A step is at most as large as a shard. Its keys are sorted by position, whichever rank sent them, so that it has as
    few blocks as a shard.
    """

    ring: RingPlan
    rank: int
    steps: tuple[MeshStep, ...]
    _tasks: dict[int, tuple[Task, ...]] = field(default_factory=dict, repr=False)

    def tasks(self, number: int) -> tuple[Task, ...]:
        """The blocks of the rank's queries against the keys of a step."""
        if number not in self._tasks:
            self._tasks[number] = self._plan(self.steps[number])
        return self._tasks[number]

    def _plan(self, step: MeshStep) -> tuple[Task, ...]:
        if step.num_rows == 0:
            return ()
        if self.ring.dense:
            return (Task(ALL, Block((0, self.ring.lengths[self.rank]), (0, step.num_rows))),)
        queries = self.ring.layout.ring_runs(self.rank)
        return tuple(
            Task(batch, block)
            for batch, mask in self.ring.batches
            for block in plan_blocks(queries, step.keys, mask, self.ring.native_bands)
        )


@lru_cache(maxsize=64)
def mesh_plan(ring: RingPlan, rank: int) -> MeshPlan:
    """The mesh exchange of ``rank``, without steps if no rank needs rows of another."""
    ranks = range(len(ring.lengths))
    if not ring.exchanges:
        return MeshPlan(ring, rank, ())
    leaving = [_slices(ring, reader, rank) for reader in ranks]
    arriving = [_slices(ring, rank, source) for source in ranks]
    steps = []
    for number in range(len(ranks) - 1):
        keys, places = in_order([of_source[number] for of_source in arriving])
        rows = tuple(tuple((piece.start, piece.stop) for piece in of_reader[number]) for of_reader in leaving)
        steps.append(MeshStep(rows, tuple(places), keys, sum(stop - start for start, stop in keys)))
    return MeshPlan(ring, rank, tuple(steps))


def _slices(ring: RingPlan, reader: int, source: int) -> list[list[Piece]]:
    """For each step, the rows of ``source``'s shard that ``reader`` receives; none of its own."""
    rows = () if reader == source else ring.rows_needed(reader, source)
    return slices(rows, ring.layout.ring_runs(source), len(ring.lengths) - 1)
