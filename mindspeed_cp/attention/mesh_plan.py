"""What each step of the mesh exchange brings to a rank, and the blocks that the rank computes with it.

The rows that a rank needs of another are split into slices of equal size, one for each step, so that every link carries
the same amount at a time. A step's slices are merged in order of position.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from mindspeed_cp.attention.ring_plan import RingPlan, Task
from mindspeed_cp.comm.channel import MeshStep
from mindspeed_cp.sequence.runs import Runs, cut, join, length, offsets


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
            self._tasks[number] = self.ring.tasks_against(self.rank, self.steps[number].keys)
        return self._tasks[number]


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
        keys, places = _in_order([of_source[number] for of_source in arriving])
        rows = tuple(tuple((piece.start, piece.stop) for piece in of_reader[number]) for of_reader in leaving)
        steps.append(MeshStep(rows, places, keys, length(keys)))
    return MeshPlan(ring, rank, tuple(steps))


class _Piece(NamedTuple):
    """Rows start to stop of a shard, which hold consecutive positions from ``position`` on."""

    start: int
    stop: int
    position: int


def _slices(ring: RingPlan, reader: int, source: int) -> list[list[_Piece]]:
    """For each step, the rows of ``source``'s shard that ``reader`` receives; none of its own."""
    rows = () if reader == source else ring.rows_needed(reader, source)
    pieces = _pieces(rows, ring.layout.ring_runs(source))
    shares = cut(tuple((piece.start, piece.stop) for piece in pieces), len(ring.lengths) - 1)
    whole = iter(pieces)
    found: list[list[_Piece]] = []
    piece = next(whole, None)
    for share in shares:
        found.append([])
        for start, stop in share:
            while piece is not None and piece.stop <= start:
                piece = next(whole, None)
            assert piece is not None, "a share lies in the pieces"
            found[-1].append(_Piece(start, stop, piece.position + start - piece.start))
    return found


def _pieces(rows: Runs, held: Runs) -> list[_Piece]:
    """The rows of a shard that holds the ascending runs ``held``, split where their positions are not consecutive."""
    before = offsets(stop - start for start, stop in held)
    pieces = []
    for start, stop in rows:
        run = bisect_right(before, start) - 1
        while start < stop:
            end = min(stop, before[run + 1])
            if start < end:
                pieces.append(_Piece(start, end, held[run][0] + start - before[run]))
            start, run = end, run + 1
    return pieces


def _in_order(arriving: Sequence[Sequence[_Piece]]) -> tuple[Runs, tuple[Runs, ...]]:
    """Merge the pieces of several shards in the order of their positions.

    Returns:
        (runs of global positions of all pieces; for each shard, the rows of its pieces within them).
    """
    pieces = sorted(
        (piece.position, piece.stop - piece.start, source)
        for source, of_source in enumerate(arriving)
        for piece in of_source
    )
    places: list[list[tuple[int, int]]] = [[] for _ in arriving]
    row = 0
    for _, count, source in pieces:
        places[source].append((row, row + count))
        row += count
    return join((position, position + count) for position, count, _ in pieces), tuple(map(tuple, places))
