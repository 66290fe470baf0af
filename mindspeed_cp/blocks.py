"""Which blocks of attention a rank must compute against a shard of keys.

Every mask that is a question of intervals (causal, full, packed documents, sliding windows) lets the query at global
position p see the keys lo(p) <= k < hi(p), where lo and hi never decrease. Counted in rows of the key shard, both are
staircases whose steps have slope 0 (a document boundary, the edge of a shard) or slope 1 (a diagonal). Where neither
slope changes, the visible keys are one block: a rectangle (0, 0), a causal square (hi has slope 1), a band (lo has
too). Nothing of size S x S is ever made, and what is empty yields no block.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache

BAND_TILE = 256  # rows of a tile with an explicit mask, where a kernel has no bands of its own


@dataclass(frozen=True)
class IntervalMask:
    """A mask described by intervals; hashable, so that plans can be cached.

    Args:
        left, right: the query at position p sees keys p - left to p + right; None is unlimited. Causal is right = 0.
        cu_seqlens: document boundaries with the leading 0 and the total, or None for one document.
    """

    left: int | None = None
    right: int | None = None
    cu_seqlens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Block:
    """Pieces of attention of one shape that lie end to end in the rows of a query shard and of a key shard.

    Piece n has query rows q_offsets[n] to q_offsets[n + 1] and key rows k_offsets[n] to k_offsets[n + 1]; its query i
    sees its key j when lower <= j - i <= upper (None is unlimited). A single rectangle is one piece; packed documents
    are many.
    """

    q_offsets: tuple[int, ...]
    k_offsets: tuple[int, ...]
    lower: int | None = None
    upper: int | None = None

    @property
    def query_rows(self):
        return slice(self.q_offsets[0], self.q_offsets[-1])

    @property
    def key_rows(self):
        return slice(self.k_offsets[0], self.k_offsets[-1])

    @property
    def is_full(self):
        return self.lower is None and self.upper is None

    @property
    def is_causal(self):
        """A causal square (every piece has as many keys as queries)."""
        return self.lower is None and self.upper == 0

    @property
    def num_pieces(self):
        return len(self.q_offsets) - 1

    def pieces(self):
        """(query slice, key slice) of every piece, relative to the first row of the block."""
        q0, k0 = self.q_offsets[0], self.k_offsets[0]
        for n in range(self.num_pieces):
            yield (
                slice(self.q_offsets[n] - q0, self.q_offsets[n + 1] - q0),
                slice(self.k_offsets[n] - k0, self.k_offsets[n + 1] - k0),
            )

    @property
    def area(self):
        """How many (query, key) pairs the block computes."""
        return sum(_area(q.stop - q.start, k.stop - k.start, self.lower, self.upper) for q, k in self.pieces())


def _area(rows, cols, lower, upper):
    """Pairs (i, j) of a rows x cols rectangle with lower <= j - i <= upper, in closed form."""

    def below(limit):  # pairs with j - i <= limit
        if limit is None:
            return rows * cols
        first = min(max(limit + 1, 0), cols)  # visible in row 0
        ramp_start = max(-limit - 1, 0)  # rows before it see nothing
        ramp_rows = min(max(cols - 1 - limit, 0), rows)  # rows before it see less than all columns
        ramp = max(ramp_rows - ramp_start, 0)
        return (
            ramp * first + ramp * (ramp - 1) // 2 + (rows - ramp_rows) * cols
            if ramp_start < ramp_rows
            else (rows - ramp_rows) * cols
        )

    return below(upper) - (below(lower - 1) if lower is not None else 0)


@dataclass
class _Segment:
    """Query rows start to start + count whose lo and hi (in key rows) are linear; a slope is None for a single row."""

    start: int
    count: int
    lo: int
    hi: int
    lo_slope: int | None
    hi_slope: int | None

    def absorb(self, other):
        """Take in the next segment if both staircases go on with a single slope; True when done."""
        lo_slope = self._joint_slope(self.lo, self.lo_slope, other.lo, other.lo_slope)
        hi_slope = self._joint_slope(self.hi, self.hi_slope, other.hi, other.hi_slope)
        if self.start + self.count != other.start or lo_slope is None or hi_slope is None:
            return False
        self.count, self.lo_slope, self.hi_slope = self.count + other.count, lo_slope, hi_slope
        return True

    def _joint_slope(self, value, slope, other_value, other_slope):
        for candidate in (0, 1):
            if (
                slope in (None, candidate)
                and other_slope in (None, candidate)
                and value + candidate * self.count == other_value
            ):
                return candidate
        return None


class _KeyRows:
    """Counts rows of a key shard: how many of its keys lie before a global position."""

    def __init__(self, runs):
        self.runs = runs
        self.starts = [start for start, _ in runs]
        self.before = [0]
        for start, stop in runs:
            self.before.append(self.before[-1] + stop - start)

    def __call__(self, position):
        index = bisect_right(self.starts, position) - 1
        if index < 0:
            return 0
        start, stop = self.runs[index]
        return self.before[index] + min(position, stop) - start


def _documents(start, stop, cu_seqlens):
    """(first, last, document start, document stop) for the stretches of positions start to stop in one document."""
    if cu_seqlens is None:
        yield start, stop, None, None
        return
    index = bisect_right(cu_seqlens, start) - 1
    while start < stop:
        low, high = cu_seqlens[index], cu_seqlens[index + 1]
        if low < high:
            yield start, min(stop, high), low, high
            start = max(start, min(stop, high))
        index += 1


def _segments(query_runs, key_runs, mask):
    """The staircases lo and hi of all query rows as linear segments, in row order."""
    rows, edges = _KeyRows(key_runs), [edge for run in key_runs for edge in run]
    row, total = 0, rows.before[-1]
    for run_start, run_stop in query_runs:
        for start, stop, low, high in _documents(run_start, run_stop, mask.cu_seqlens):
            cuts = {start, stop}
            if mask.right is not None:
                cuts.update(edge - mask.right - 1 for edge in edges + ([high] if high is not None else []))
            if mask.left is not None:
                cuts.update(edge + mask.left for edge in edges + ([low] if low is not None else []))

            def lo(p, low=low):
                reach = p - mask.left if mask.left is not None else None
                limits = [limit for limit in (low, reach) if limit is not None]
                return rows(max(limits)) if limits else 0

            def hi(p, high=high):
                reach = p + mask.right + 1 if mask.right is not None else None
                limits = [limit for limit in (high, reach) if limit is not None]
                return rows(min(limits)) if limits else total

            cuts = sorted(cut for cut in cuts if start <= cut <= stop)
            for first, last in zip(cuts, cuts[1:]):
                slopes = (None, None) if last - first == 1 else (lo(first + 1) - lo(first), hi(first + 1) - hi(first))
                yield _Segment(row + first - run_start, last - first, lo(first), hi(first), *slopes)
        row += run_stop - run_start


def _merged_segments(query_runs, key_runs, mask):
    merged = []
    for segment in _segments(query_runs, key_runs, mask):
        if not merged or not merged[-1].absorb(segment):
            merged.append(segment)
    return merged


def _segment_block(segment):
    """The block of one segment, or None where its rows see no key."""
    if segment.hi <= segment.lo:
        if segment.lo_slope or not segment.hi_slope:
            return None
        # The first row sees nothing yet: the diagonal enters the shard in the second.
        segment = replace(segment, start=segment.start + 1, count=segment.count - 1, hi=segment.hi + 1)
    if segment.lo_slope and not segment.hi_slope:
        # The window leaves the shard: the last rows see nothing any more, and a fused band must not contain such a row.
        segment = replace(segment, count=min(segment.count, segment.hi - segment.lo))
    last = segment.count - 1
    k_stop = segment.hi + (segment.hi_slope or 0) * last
    lower = 0 if segment.lo_slope else None
    upper = segment.hi - segment.lo - 1 if segment.hi_slope else None
    if segment.count == 1:
        lower = upper = None
    return Block((segment.start, segment.start + segment.count), (segment.lo, k_stop), lower, upper)


def _cut(block, q, k, lower, upper):
    """A block of the rows q and columns k of ``block``'s single piece."""
    q0, k0 = block.q_offsets[0], block.k_offsets[0]
    return Block((q0 + q[0], q0 + q[1]), (k0 + k[0], k0 + k[1]), lower, upper)


def _split(block, native_bands):
    """Rewrite a single-piece block into shapes that the kernel has.

    A diagonal that does not begin in the corner becomes a rectangle and a causal square. A band becomes tiles of
    BAND_TILE rows: a triangle at each boundary and a rectangle between them, or one small masked tile where they
        overlap.
    """
    rows, cols = block.q_offsets[1] - block.q_offsets[0], block.k_offsets[1] - block.k_offsets[0]
    if block.is_full or block.is_causal:
        return [block]
    if block.lower is None:
        return [
            _cut(block, (0, rows), (0, block.upper), None, None),
            _cut(block, (0, rows), (block.upper, cols), None, 0),
        ]
    if native_bands:
        return [block]
    parts = []
    for start in range(0, rows, BAND_TILE):
        stop = min(start + BAND_TILE, rows)
        q, left_stop = (start, stop), min(stop + block.lower, cols)
        right_start = cols if block.upper is None else start + block.upper
        if left_stop > right_start:
            end = cols if block.upper is None else min(stop + block.upper, cols)
            parts.append(_cut(block, q, (start, end), block.lower, block.upper))
            continue
        parts.append(_cut(block, q, (start + block.lower, left_stop), 0, None))
        if left_stop < right_start:
            parts.append(_cut(block, q, (left_stop, right_start), None, None))
        if block.upper is not None:
            parts.append(_cut(block, q, (right_start, right_start + stop - start), None, 0))
    return parts


def _pack(blocks):
    """Join blocks of one shape that lie end to end, so that a varlen kernel computes them in one call."""
    packed = []
    for block in blocks:
        last = packed[-1] if packed else None
        if (
            last
            and (block.is_full or block.is_causal)
            and (last.lower, last.upper) == (block.lower, block.upper)
            and last.q_offsets[-1] == block.q_offsets[0]
            and last.k_offsets[-1] == block.k_offsets[0]
        ):
            packed[-1] = Block(
                last.q_offsets + block.q_offsets[1:], last.k_offsets + block.k_offsets[1:], last.lower, last.upper
            )
        else:
            packed.append(block)
    return packed


@lru_cache(maxsize=4096)
def plan_blocks(query_runs, key_runs, mask, native_bands=False):
    """The blocks that the queries at ``query_runs`` must compute against the keys at ``key_runs``.

    Args:
        query_runs, key_runs: tuples of (start, stop) of global positions, ascending; rows count along them.
        mask: IntervalMask.
        native_bands: the kernel computes bands (two diagonal limits) itself.

    Returns:
        tuple of Block, in ascending query rows; empty when no query sees a key.
    """
    blocks = [_segment_block(segment) for segment in _merged_segments(query_runs, key_runs, mask)]
    return tuple(_pack([part for block in blocks if block for part in _split(block, native_bands)]))


@lru_cache(maxsize=4096)
def needed_rows(query_runs, key_runs, mask):
    """Rows of the key shard that some query at ``query_runs`` sees, as ascending disjoint (start, stop)."""
    spans = sorted((b.key_rows.start, b.key_rows.stop) for b in plan_blocks(query_runs, key_runs, mask, True))
    needed = []
    for start, stop in spans:
        if needed and start <= needed[-1][1]:
            needed[-1] = (needed[-1][0], max(stop, needed[-1][1]))
        else:
            needed.append((start, stop))
    return tuple(needed)
