"""Which blocks of attention a rank must compute against a shard of keys.

Every mask is a set of slices (causal, full, packed documents, sliding windows, prefixes, trees). In each of them the
query at global position p sees the keys lo(p) <= k < hi(p), where lo and hi never decrease. Counted in rows of the key
shard, both are staircases whose steps have slope 0 (an end of the slice, the edge of a shard) or slope 1 (a diagonal).
Where neither slope changes, the visible keys form one block: a rectangle (slopes 0 and 0), a causal square (hi has
slope 1) or a band (lo has slope 1). Nothing of size S x S is ever allocated, and empty ranges yield no block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_cp.sequence.runs import Run, Runs, union
from mindspeed_cp.sequence.slice_mask import SliceMask
from mindspeed_cp.sequence.staircases import Pieces, visible_pieces

# (query start, query stop, key start, key stop, lower, upper)
Shape = tuple[int, int, int, int, int | None, int | None]

BAND_TILE = 256  # rows of a tile with an explicit mask, for kernels that cannot compute bands themselves


@dataclass(frozen=True)
class Block:
    """One or more pieces of attention of the same shape, contiguous in the rows of a query shard and of a key shard.

    Piece n has query rows q_offsets[n] to q_offsets[n + 1] and key rows k_offsets[n] to k_offsets[n + 1]; its query i
    sees its key j when lower <= j - i <= upper (None is unlimited). A single rectangle is one piece; packed documents
    are many.
    """

    q_offsets: tuple[int, ...]
    k_offsets: tuple[int, ...]
    lower: int | None = None
    upper: int | None = None

    @property
    def query_rows(self) -> slice:
        return slice(self.q_offsets[0], self.q_offsets[-1])

    @property
    def key_rows(self) -> slice:
        return slice(self.k_offsets[0], self.k_offsets[-1])

    @property
    def is_full(self) -> bool:
        return self.lower is None and self.upper is None

    @property
    def is_causal(self) -> bool:
        """A causal square (every piece has as many keys as queries)."""
        return self.lower is None and self.upper == 0

    @property
    def num_pieces(self) -> int:
        return len(self.q_offsets) - 1

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """(query slice, key slice) of every piece, relative to the first row of the block."""
        q0, k0 = self.q_offsets[0], self.k_offsets[0]
        for n in range(self.num_pieces):
            yield (
                slice(self.q_offsets[n] - q0, self.q_offsets[n + 1] - q0),
                slice(self.k_offsets[n] - k0, self.k_offsets[n + 1] - k0),
            )

    @property
    def area(self) -> int:
        """How many (query, key) pairs the block computes."""
        return sum(_area(q.stop - q.start, k.stop - k.start, self.lower, self.upper) for q, k in self.pieces())


def _area(rows: int, cols: int, lower: int | None, upper: int | None) -> int:
    """Pairs (i, j) of a rows x cols rectangle with lower <= j - i <= upper, in closed form."""

    def triangle(side: int) -> int:
        return max(side, 0) * (side + 1) // 2

    def below(limit: int | None) -> int:  # pairs with j - i <= limit: row i has limit + 1 + i of them, from 0 to cols
        if limit is None:
            return rows * cols
        whole, beyond = triangle(limit + rows) - triangle(limit), triangle(limit + rows - cols) - triangle(limit - cols)
        return whole - beyond

    return below(upper) - (below(lower - 1) if lower is not None else 0)


def _cut(block: Block, q: Run, k: Run, lower: int | None, upper: int | None) -> Block:
    """A block of the rows q and columns k of ``block``'s single piece."""
    q0, k0 = block.q_offsets[0], block.k_offsets[0]
    return Block((q0 + q[0], q0 + q[1]), (k0 + k[0], k0 + k[1]), lower, upper)


def _tiles(block: Block) -> list[Block]:
    """Split a band into shapes that every kernel can compute, BAND_TILE rows at a time.

    A triangle at each boundary and a rectangle between them, or one small masked tile where the triangles overlap.
    """
    rows, cols = block.q_offsets[1] - block.q_offsets[0], block.k_offsets[1] - block.k_offsets[0]
    assert block.lower is not None
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


def _shapes(pieces: Pieces) -> Iterator[Shape]:
    """The shape of each piece's block, in row order.

    A diagonal that does not begin in the corner becomes a rectangle and a causal square.
    """
    for row, count, lo, hi, lo_slope, hi_slope in zip(
        pieces.row, pieces.count, pieces.lo, pieces.hi, pieces.lo_slope, pieces.hi_slope
    ):
        if hi <= lo:
            # The first row sees nothing yet: the diagonal enters the shard in the second.
            row, count, hi = row + 1, count - 1, hi + 1
        if lo_slope == 1 and hi_slope != 1:
            # The window leaves the shard: the last rows see no key, and a band must not contain such rows.
            count = min(count, hi - lo)
        stop = row + count
        if count == 1 or (lo_slope != 1 and hi_slope != 1):
            yield row, stop, lo, hi, None, None
        elif lo_slope == 1:
            reach = count - 1 if hi_slope == 1 else 0
            yield row, stop, lo, hi + reach, 0, hi - lo - 1 if hi_slope == 1 else None
        else:
            if hi - 1 > lo:
                yield row, stop, lo, hi - 1, None, None
            yield row, stop, hi - 1, hi - 1 + count, None, 0


def _stacked(shapes: Iterator[Shape]) -> list[Shape]:
    """Merge rectangles over the same keys whose query rows are adjacent, such as a prefix that several slices see."""
    found: list[Shape] = []
    below: dict[tuple[int, int, int], int] = {}  # (row, first key, last + 1) -> the rectangle that ends above it
    for shape in shapes:
        row, stop, lo, hi, lower, upper = shape
        place = below.pop((row, lo, hi), None) if lower is upper is None else None
        if lower is upper is None:
            below[stop, lo, hi] = len(found) if place is None else place
        if place is None:
            found.append(shape)
        else:
            found[place] = (found[place][0], stop, lo, hi, None, None)
    return found


def plan_blocks(query_runs: Runs, key_runs: Runs, mask: SliceMask, native_bands: bool = False) -> tuple[Block, ...]:
    """The blocks that the queries at ``query_runs`` must compute against the keys at ``key_runs``.

    Adjacent blocks of the same shape are merged into one, which a varlen kernel computes in one call.

    Args:
        query_runs, key_runs: tuples of (start, stop) of global positions, ascending; rows count along them.
        native_bands: whether the kernel computes bands (two diagonal limits) itself.

    Returns:
        tuple of Block, slice by slice; empty when no query sees a key.
    """
    chains: list[tuple[list[int], list[int], int | None, int | None]] = []
    ends: dict[tuple[int, int, int | None], int] = {}  # where a chain ends, and its shape -> the chain
    for row, stop, lo, hi, lower, upper in _stacked(_shapes(visible_pieces(query_runs, key_runs, mask))):
        chain = ends.pop((row, lo, upper), None) if lower is None else None
        if chain is None:
            chain = len(chains)
            chains.append(([row], [lo], lower, upper))
        chains[chain][0].append(stop)
        chains[chain][1].append(hi)
        if lower is None:
            ends[stop, hi, upper] = chain
    blocks = (Block(tuple(q_offsets), tuple(k_offsets), *limits) for q_offsets, k_offsets, *limits in chains)
    return tuple(
        part for block in blocks for part in ([block] if native_bands or block.lower is None else _tiles(block))
    )


def needed_rows(query_runs: Runs, key_runs: Runs, mask: SliceMask) -> Runs:
    """Rows of the key shard that some query at ``query_runs`` sees, as ascending disjoint (start, stop)."""
    shapes = _shapes(visible_pieces(query_runs, key_runs, mask))
    return union((start, stop) for _, _, start, stop, _, _ in shapes)
