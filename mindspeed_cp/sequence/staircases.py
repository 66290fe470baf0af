"""The two staircases of every slice of a mask, cut into pieces in which both slopes are constant.

Within a slice the query at global position p sees the keys lo(p) <= k < hi(p), and lo and hi never decrease. Counted in
rows of a key shard, each has steps of slope 0 (an end of the slice, the edge of a shard) or slope 1 (a diagonal). The
cost is proportional to the slices of this shard's queries; only the pieces that see a key are handled in Python loops.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.cache import kept_up_to
from mindspeed_cp.sequence.runs import Runs, length
from mindspeed_cp.sequence.slice_mask import FAR, Integers, SliceMask, spread

Bools = npt.NDArray[np.bool_]
PieceOf = tuple[int, int, int, int, int, int]  # row, count, lo, hi, lo_slope, hi_slope

UNKNOWN = -1  # slope of a piece with a single row


@dataclass(frozen=True)
class Stretches:
    """Ranges of query positions, each within one run and one slice, slice by slice; int64 arrays of equal length.

    Args:
        row: row of the query shard at which the stretch begins.
        low, high: the slice's keys.
        lower, upper: the slice's limits on key - query; -FAR and FAR mean no limit.
    """

    row: Integers
    start: Integers
    stop: Integers
    low: Integers
    high: Integers
    lower: Integers
    upper: Integers

    def chosen(self, which: Bools) -> "Stretches":
        return Stretches(*(column[which] for column in vars(self).values()))


@dataclass(frozen=True)
class Pieces:
    """Query rows row to row + count; the first sees key rows lo to hi, and each bound grows by its slope per row.

    A slope is 0 or 1, or UNKNOWN for a single row. Lists of equal length.
    """

    row: list[int]
    count: list[int]
    lo: list[int]
    hi: list[int]
    lo_slope: list[int]
    hi_slope: list[int]


NOTHING = Pieces([], [], [], [], [], [])


class _KeyRows:
    """Convert global positions to rows of a key shard: the number of its keys before each position."""

    def __init__(self, runs: Runs) -> None:
        self.start, self.stop = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        self.before = np.concatenate([[0], np.cumsum(self.stop - self.start)])

    def __call__(self, positions: Integers) -> Integers:
        index = np.searchsorted(self.start, positions, side="right") - 1
        inside = np.minimum(positions, self.stop[index]) - self.start[index]
        rows: Integers = np.where(index < 0, 0, self.before[index] + inside)
        return rows


def _num_bytes(made: Stretches) -> int:
    return len(vars(made)) * made.row.nbytes


@kept_up_to(8 << 20, _num_bytes)
def stretches(query_runs: Runs, mask: SliceMask) -> Stretches:
    """The queries of a shard in each slice, cut where its runs end."""
    start, stop = np.array(query_runs, dtype=np.int64).reshape(-1, 2).T
    row, slices = np.cumsum(stop - start) - (stop - start), mask.slices
    # A run and a slice intersect if the slice begins within the run, or the run within the slice.
    first = np.searchsorted(slices.q_start, start, side="left")
    around, number = spread(np.searchsorted(slices.q_start, stop, side="left") - first)
    begun = first[around] + number
    first = np.searchsorted(start, slices.q_start, side="right")
    cut, number = spread(np.maximum(np.searchsorted(start, slices.q_stop, side="left") - first, 0))
    run, which = np.append(around, first[cut] + number), np.append(begun, cut)
    order = np.lexsort((run, which))
    run, found = run[order], slices.chosen(which[order])
    begin, end = np.maximum(found.q_start, start[run]), np.minimum(found.q_stop, stop[run])
    return Stretches(row[run] + begin - start[run], begin, end, *found[2:])


def visible_pieces(query_runs: Runs, key_runs: Runs, mask: SliceMask) -> Pieces:
    """The pieces of the staircases that see a key, slice by slice and in row order within each. Adjacent pieces are
    merged if both bounds continue with the same slope.

    Args:
        query_runs, key_runs: (start, stop) of global positions, ascending; rows are indices into them.
    """
    if not query_runs or not key_runs:
        return NOTHING
    rows, queries = _KeyRows(key_runs), stretches(query_runs, mask)

    def lo(owner: Integers, position: Integers) -> Integers:
        return rows(np.maximum(queries.low[owner], position + queries.lower[owner]))

    def hi(owner: Integers, position: Integers) -> Integers:
        return rows(np.minimum(queries.high[owner], position + queries.upper[owner] + 1))

    everyone = np.arange(len(queries.start))
    queries = queries.chosen(lo(everyone, queries.start) < hi(everyone, queries.stop - 1))
    if not len(queries.start):
        return NOTHING
    owner, first, last = _cut_where_slopes_change(queries, rows)
    count = last - first
    begin, end = lo(owner, first), hi(owner, first)
    single = count == 1
    lo_slope = np.where(single, UNKNOWN, lo(owner, first + 1) - begin)
    hi_slope = np.where(single, UNKNOWN, hi(owner, first + 1) - end)
    row = queries.row[owner] + first - queries.start[owner]
    seen = (end > begin) | ((hi_slope == 1) & (lo_slope != 1))
    return _joined(*(part[seen] for part in (row, count, begin, end, lo_slope, hi_slope)))


def bounds_of_rows(query_runs: Runs, key_runs: Runs, mask: SliceMask) -> Iterator[tuple[Integers, Integers]]:
    """(lo, hi) of every query row, the key rows that it sees in one slice; once for each of the row's slices."""
    pieces = visible_pieces(query_runs, key_runs, mask)
    row, count, lo, hi, lo_slope, hi_slope = (np.array(part, dtype=np.int64) for part in vars(pieces).values())
    piece, number = spread(count)
    bounds = np.stack(
        [
            row[piece] + number,
            lo[piece] + np.maximum(lo_slope[piece], 0) * number,
            hi[piece] + np.maximum(hi_slope[piece], 0) * number,
        ]
    )
    rows, low, high = bounds[:, np.argsort(bounds[0], kind="stable")]
    turn = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
    for each in range(int(turn.max(initial=-1)) + 1):
        found = np.zeros((2, length(query_runs)), dtype=np.int64)
        found[:, rows[turn == each]] = low[turn == each], high[turn == each]
        yield found[0], found[1]


def _cut_where_slopes_change(queries: Stretches, rows: _KeyRows) -> tuple[Integers, Integers, Integers]:
    """(owning stretch, first, last + 1) of position ranges in which both slopes are constant."""
    everyone = np.arange(len(queries.start))
    # Key runs that a stretch's queries can see, from the first query's lower bound to the last query's upper bound.
    low = np.maximum(queries.low, queries.start + queries.lower)
    high = np.minimum(queries.high, queries.stop + queries.upper)
    first_run = np.searchsorted(rows.stop, low, side="right")
    meets, number = spread(np.maximum(np.searchsorted(rows.start, high, side="left") - first_run, 0))
    edges = np.concatenate([rows.start[first_run[meets] + number], rows.stop[first_run[meets] + number]])
    owners, cuts = [everyone], [queries.start]
    for limit, end, shift in ((queries.upper, queries.high, 1), (queries.lower, queries.low, 0)):
        owner, bounds = np.concatenate([meets, meets, everyone]), np.append(edges, end)
        limited = np.abs(limit[owner]) < FAR
        owners.append(owner[limited])
        cuts.append(bounds[limited] - limit[owner[limited]] - shift)
    owner, cut = np.concatenate(owners), np.concatenate(cuts)
    inside = (cut >= queries.start[owner]) & (cut < queries.stop[owner])
    # Stretches are concatenated, since those of different slices may have the same positions.
    lengths = queries.stop - queries.start
    before = np.cumsum(lengths) - lengths
    places = np.unique((before - queries.start)[owner[inside]] + cut[inside])
    owner = np.searchsorted(before, places, side="right") - 1
    to_position = queries.start[owner] - before[owner]
    return owner, places + to_position, np.append(places[1:], lengths.sum()) + to_position


def _joined(
    row: Integers, count: Integers, lo: Integers, hi: Integers, lo_slope: Integers, hi_slope: Integers
) -> Pieces:
    """Merge adjacent pieces whose bounds continue with the same slope, if both see a common key."""
    parts = [part.tolist() for part in (row, count, lo, hi, lo_slope, hi_slope)]
    if len(row) < 2:
        return Pieces(*parts)
    follows = row[1:] == row[:-1] + count[:-1]
    for bound, slope in ((lo, lo_slope), (hi, hi_slope)):
        step = bound[1:] - bound[:-1]
        steep, level = slope == 1, slope == 0
        goes_up = (step == count[:-1]) & ~(level[:-1] | level[1:])
        stays = (step == 0) & ~(steep[:-1] | steep[1:])
        follows &= goes_up | stays
    if not follows.any():
        return Pieces(*parts)
    joined: list[PieceOf] = []
    for piece in zip(*parts):
        if joined and (longer := _one_piece(joined[-1], piece)):
            joined[-1] = longer
        else:
            joined.append(piece)
    return Pieces(*map(list, zip(*joined)))


def _one_piece(left: PieceOf, right: PieceOf) -> PieceOf | None:
    """Two adjacent pieces merged into one, or None if they cannot be."""
    row, count, lo, hi, *slopes = left
    if row + count != right[0]:
        return None
    found: list[int] = []
    for value, slope, other, other_slope in zip((lo, hi), slopes, right[2:4], right[4:]):
        step = next((s for s in (0, 1) if {slope, other_slope} <= {UNKNOWN, s} and value + s * count == other), None)
        if step is None:
            return None
        found.append(step)
    if found == [1, 1] and hi - lo == 1:
        # Neither row sees a key of the other, so they may be from two documents. Merged, the kernel would read keys of
        # another document with weight 0, and 0 times NaN is NaN.
        return None
    return row, count + right[1], lo, hi, found[0], found[1]
