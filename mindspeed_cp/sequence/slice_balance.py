"""The balanced layout for masks made of slices: equal token counts and nearly equal areas on every ring rank.

The row is cut into equal chunks, which are dealt by area in serpentine order, as a zigzag deals those of a causal row:
the largest to the first rank, the next to the second, and back again from the last rank. Few large chunks send less
than many small ones, so the smallest number of chunks that balances is used.
"""

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.runs import Runs, join, offsets, split_sizes
from mindspeed_cp.sequence.slice_mask import Integers, SliceMask, SliceTable, spread

CHUNKS_PER_RANK = (2, 4, 8, 16, 32)
GOOD = 1.05  # the search ends when the largest area is at most this multiple of the mean


def area_before(mask: SliceMask, positions: Integers) -> Integers:
    """int64, for each of the ascending ``positions``: number of (query, key) pairs of all queries before it."""
    slices = mask.slices
    first = np.searchsorted(positions, slices.q_start, side="right")
    last = np.searchsorted(positions, slices.q_stop, side="left")
    ended = np.zeros(len(positions) + 1, dtype=np.int64)
    np.add.at(ended, last, _pairs_before(slices, slices.q_stop))
    area = np.cumsum(ended)[:-1]
    owner, number = spread(np.maximum(last - first, 0))
    place = first[owner] + number
    np.add.at(area, place, _pairs_before(slices.chosen(owner), positions[place]))
    return area


def _pairs_before(slices: SliceTable, stop: Integers) -> Integers:
    """Number of pairs of each slice's queries before ``stop``, which lies in the slice's query range or at its end."""
    start = slices.q_start
    # The query at p sees keys from max(k_start, p + lower) to min(k_stop, p + upper + 1).
    bend = np.clip(slices.k_stop - slices.upper - 1, start, stop)
    high = _sum(start, bend) + (slices.upper + 1) * (bend - start) + slices.k_stop * (stop - bend)
    bend = np.clip(slices.k_start - slices.lower, start, stop)
    low = slices.k_start * (bend - start) + _sum(bend, stop) + slices.lower * (stop - bend)
    pairs: Integers = high - low
    return pairs


def _sum(start: Integers, stop: Integers) -> Integers:
    """Sum of the integers from start to stop - 1."""
    total: Integers = (stop * (stop - 1) - start * (start - 1)) // 2
    return total


def imbalance_of_slices(rings: list[Runs], mask: SliceMask) -> float:
    """Largest area of a ring rank divided by the mean; ``rings``: each rank's runs, together the whole sequence."""
    runs = sorted((start, stop, rank) for rank, own in enumerate(rings) for start, stop in own)
    _, stop, owner = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    return _ratio(np.diff(area_before(mask, stop), prepend=0), owner, len(rings))


def _ratio(areas: Integers, owner: npt.NDArray[np.integer], num_ranks: int) -> float:
    loads = np.bincount(owner, weights=areas, minlength=num_ranks)
    return float(loads.max() / max(loads.mean(), 1.0))


def balanced_by_slices(mask: SliceMask, seq_len: int, num_ranks: int) -> tuple[Runs, ...]:
    """The runs of every ring rank, ascending."""
    best: tuple[float, list[int], Integers] | None = None
    for per_rank in CHUNKS_PER_RANK:
        cuts = offsets(split_sizes(seq_len, num_ranks * per_rank))
        areas = np.diff(area_before(mask, np.array(cuts, dtype=np.int64)))
        owner = _dealt(areas, seq_len % len(areas), num_ranks)
        ratio = _ratio(areas, owner, num_ranks)
        if best is None or ratio < best[0]:
            best = ratio, cuts, owner
        if ratio <= GOOD or seq_len < 2 * num_ranks * per_rank:
            break
    assert best is not None
    _, cuts, owner = best
    chunks = list(zip(cuts, cuts[1:]))
    return tuple(join(chunks[place] for place in np.flatnonzero(owner == rank)) for rank in range(num_ranks))


def _dealt(areas: Integers, num_larger: int, num_ranks: int) -> Integers:
    """The rank of every chunk. The first ``num_larger`` chunks have one more token: they are dealt first, so that the
    ranks' token counts differ by at most one.
    """
    order = np.lexsort((-areas, np.arange(len(areas)) >= num_larger))
    turn = np.arange(len(areas)) % (2 * num_ranks)
    owner = np.empty(len(areas), dtype=np.int64)
    owner[order] = np.where(turn < num_ranks, turn, 2 * num_ranks - 1 - turn)
    return owner
