"""The two staircases of an interval mask, cut into pieces where both are straight.

The query at global position p sees the keys lo(p) <= k < hi(p), and lo and hi never decrease. Counted in rows of a key
shard, each has steps of slope 0 (a document boundary, the edge of a shard) or slope 1 (a diagonal). The work is
proportional to the documents that this shard's queries belong to, and in Python to the pieces that see a key.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.cache import kept_up_to
from mindspeed_cp.sequence.runs import Boundaries, Runs

Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
PieceOf = tuple[int, int, int, int, int, int]  # row, count, lo, hi, lo_slope, hi_slope

FAR = 1 << 60  # beyond every position: no limit
UNKNOWN = -1  # slope of a piece of one row


@dataclass(frozen=True)
class IntervalMask:
    """A mask described by intervals; hashable, so that plans can be cached.

    Args:
        left, right: the query at position p sees keys p - left to p + right; None is unlimited. Causal is right = 0.
        cu_seqlens: document boundaries with the leading 0 and the total, or None for one document.
    """

    left: int | None = None
    right: int | None = None
    cu_seqlens: Boundaries | None = None

    def __hash__(self) -> int:
        # Thousands of documents are hashed once, not at every lookup.
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash((self.left, self.right, self.cu_seqlens))
            object.__setattr__(self, "_hash", found)
        return found


@dataclass(frozen=True)
class Stretches:
    """Query positions start to stop of one run and one document each, ascending; int64 arrays of one length.

    Args:
        row: row of the query shard at which the stretch begins.
        low, high: the document's boundaries, -FAR and FAR without documents.
    """

    row: Integers
    start: Integers
    stop: Integers
    low: Integers
    high: Integers

    def chosen(self, which: Bools) -> "Stretches":
        return Stretches(self.row[which], self.start[which], self.stop[which], self.low[which], self.high[which])


@dataclass(frozen=True)
class Pieces:
    """Query rows row to row + count, whose first sees key rows lo to hi; both bounds grow by their slope with each row.

    A slope is 0 or 1, or UNKNOWN for a single row. Lists of one length.
    """

    row: list[int]
    count: list[int]
    lo: list[int]
    hi: list[int]
    lo_slope: list[int]
    hi_slope: list[int]


NOTHING = Pieces([], [], [], [], [], [])


class _KeyRows:
    """Counts rows of a key shard: how many of its keys lie before each of some global positions."""

    def __init__(self, runs: Runs) -> None:
        self.start, self.stop = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        self.before = np.concatenate([[0], np.cumsum(self.stop - self.start)])

    def __call__(self, positions: Integers) -> Integers:
        index = np.searchsorted(self.start, positions, side="right") - 1
        inside = np.minimum(positions, self.stop[index]) - self.start[index]
        rows: Integers = np.where(index < 0, 0, self.before[index] + inside)
        return rows


def _spread(counts: Integers) -> tuple[Integers, Integers]:
    """For counts (2, 0, 3): each member's owner (0, 0, 2, 2, 2), and its number there (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _num_bytes(made: Stretches) -> int:
    return 5 * made.row.nbytes


@kept_up_to(8 << 20, _num_bytes)
def stretches(query_runs: Runs, cu_seqlens: Boundaries | None) -> Stretches:
    """The queries of a shard, cut where its runs and the documents end."""
    start, stop = np.array(query_runs, dtype=np.int64).reshape(-1, 2).T
    row = np.cumsum(stop - start) - (stop - start)
    if cu_seqlens is None:
        far = np.full(len(start), FAR)
        return Stretches(row, start, stop, -far, far)
    ends = np.unique(np.array(cu_seqlens, dtype=np.int64))
    first = np.searchsorted(ends, start, side="right") - 1
    run, number = _spread(np.searchsorted(ends, stop, side="left") - first)
    document = first[run] + number
    low, high = ends[document], ends[document + 1]
    begin = np.maximum(low, start[run])
    return Stretches(row[run] + begin - start[run], begin, np.minimum(high, stop[run]), low, high)


def visible_pieces(query_runs: Runs, key_runs: Runs, mask: IntervalMask) -> Pieces:
    """The pieces of the staircases that see a key, in row order, neighbours joined where both bounds go on straight.

    Args:
        query_runs, key_runs: (start, stop) of global positions, ascending; rows count along them.
    """
    if not query_runs or not key_runs:
        return NOTHING
    rows, queries = _KeyRows(key_runs), stretches(query_runs, mask.cu_seqlens)

    def lo(owner: Integers, position: Integers) -> Integers:
        return rows(queries.low[owner] if mask.left is None else np.maximum(queries.low[owner], position - mask.left))

    def hi(owner: Integers, position: Integers) -> Integers:
        reach = FAR if mask.right is None else position + mask.right + 1
        return rows(np.minimum(queries.high[owner], reach))

    everyone = np.arange(len(queries.start))
    queries = queries.chosen(lo(everyone, queries.start) < hi(everyone, queries.stop - 1))
    if not len(queries.start):
        return NOTHING
    owner, first, last = _cut_where_slopes_change(queries, rows, mask)
    count = last - first
    begin, end = lo(owner, first), hi(owner, first)
    single = count == 1
    lo_slope = np.where(single, UNKNOWN, lo(owner, first + 1) - begin)
    hi_slope = np.where(single, UNKNOWN, hi(owner, first + 1) - end)
    row = queries.row[owner] + first - queries.start[owner]
    seen = (end > begin) | ((hi_slope == 1) & (lo_slope != 1))
    return _joined(*(part[seen] for part in (row, count, begin, end, lo_slope, hi_slope)))


def _cut_where_slopes_change(
    queries: Stretches, rows: _KeyRows, mask: IntervalMask
) -> tuple[Integers, Integers, Integers]:
    """(owning stretch, first, last + 1) of position ranges in which both bounds are straight."""
    everyone = np.arange(len(queries.start))
    cuts, owners = [queries.start], [everyone]
    # Key runs that a stretch's queries can see, from the first query's lower to the last one's upper bound.
    low = queries.low if mask.left is None else np.maximum(queries.low, queries.start - mask.left)
    high = queries.high if mask.right is None else np.minimum(queries.high, queries.stop + mask.right)
    first_run = np.searchsorted(rows.stop, low, side="right")
    num_runs = np.searchsorted(rows.start, high, side="left") - first_run
    owner, number = _spread(np.maximum(num_runs, 0))
    run = first_run[owner] + number
    edges = np.concatenate([rows.start[run], rows.stop[run]])
    owner = np.concatenate([owner, owner])
    for shift, limit in ((None if mask.right is None else -mask.right - 1, queries.high), (mask.left, queries.low)):
        if shift is not None:
            cuts += [edges + shift, limit + shift]
            owners += [owner, everyone]
    cut, owner = np.concatenate(cuts), np.concatenate(owners)
    inside = (cut >= queries.start[owner]) & (cut < queries.stop[owner])
    # Stretches are disjoint and ascend, so positions alone put the cuts in order.
    first, index = np.unique(cut[inside], return_index=True)
    owner = owner[inside][index]
    return owner, first, np.minimum(np.append(first[1:], FAR), queries.stop[owner])


def _joined(
    row: Integers, count: Integers, lo: Integers, hi: Integers, lo_slope: Integers, hi_slope: Integers
) -> Pieces:
    """Neighbouring pieces whose bounds go on with one slope become one, where they see a key together."""
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
    """Two neighbours as one piece, or None."""
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
        # Neither row sees a key of the other. They may be of two documents, and what a kernel hides must not be: NaN
        # times a weight of 0 is NaN.
        return None
    return row, count + right[1], lo, hi, found[0], found[1]
