"""The balanced layout: equal token counts and nearly equal areas on every ring rank, and few rows that travel.

With documents, a zigzag over the whole row is uneven, because a token's work is its position within its document. Here
every rank gets whole documents (mindspeed_cp/sequence/filling.py), and parts of those that are too long for one rank.
Short documents then send nothing, and long ones lie on as few ranks as balance allows.

A row with any other mask is cut into equal chunks, which are dealt by area in serpentine order, as a zigzag deals those
of a causal row: the largest to the first rank, the next to the second, and back again from the last rank. Few large
chunks send less than many small ones, so the smallest number of chunks that balances is used.

The result depends only on the boundaries or the mask, so every rank computes the same layout without communication.

Related: the dispatch solver of MagiAttention (arXiv 2505.13211), WLB-LLM (arXiv 2503.17924). n: ring ranks.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.cache import RUN_BYTES, kept_up_to
from mindspeed_cp.sequence.filling import Part, TokenWork, fill_ranks
from mindspeed_cp.sequence.nodes import within_nodes
from mindspeed_cp.sequence.runs import Boundaries, Runs, join, offsets, split_sizes
from mindspeed_cp.sequence.slice_mask import Integers, SliceMask, SliceTable, spread

Areas = npt.NDArray[np.float64]  # integers would overflow from 2**32 tokens on

GOOD = 1.05  # a search ends when the largest area is at most this multiple of the mean
GOALS = (1.04, 1.02, 1.0, 0.97)  # ranks are filled up to these multiples of the mean; higher goals cut fewer documents
SLACK = 0.0095  # a rank may exceed its goal by this, if a whole piece then fits; first goal + SLACK is below GOOD
CHUNKS_PER_RANK = (2, 4, 8, 16, 32)


def area_before(mask: SliceMask, positions: Integers) -> Areas:
    """For each of the ascending ``positions``: number of (query, key) pairs of all queries before it."""
    slices = mask.slices
    first = np.searchsorted(positions, slices.q_start, side="right")
    last = np.searchsorted(positions, slices.q_stop, side="left")
    ended = np.zeros(len(positions) + 1)
    np.add.at(ended, last, _pairs_before(slices, slices.q_stop))
    area = np.cumsum(ended)[:-1]
    owner, number = spread(np.maximum(last - first, 0))
    place = first[owner] + number
    np.add.at(area, place, _pairs_before(slices.chosen(owner), positions[place]))
    return area


def _pairs_before(slices: SliceTable, stop: Integers) -> Areas:
    """Number of pairs of each slice's queries before ``stop``, which lies in the slice's query range or at its end."""
    start = slices.q_start
    # The query at p sees keys from max(k_start, p + lower) to min(k_stop, p + upper + 1).
    bend = np.clip(slices.k_stop - slices.upper - 1, start, stop)
    high = _sum(start + slices.upper + 1, bend - start) + slices.k_stop * (stop - bend).astype(np.float64)
    bend = np.clip(slices.k_start - slices.lower, start, stop)
    low = slices.k_start * (bend - start).astype(np.float64) + _sum(bend + slices.lower, stop - bend)
    pairs: Areas = high - low
    return pairs


def _sum(first: Integers, count: Integers) -> Areas:
    """Sum of ``count`` consecutive integers."""
    total: Areas = count * (2.0 * first + (count - 1)) / 2
    return total


def imbalance(rings: Sequence[Runs], mask: SliceMask) -> float:
    """Largest area of a ring rank divided by the mean; ``rings``: each rank's runs, together the whole sequence."""
    runs = sorted((start, stop, rank) for rank, own in enumerate(rings) for start, stop in own)
    _, stop, owner = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    return _ratio(np.diff(area_before(mask, stop), prepend=0), owner, len(rings))


def _ratio(areas: Areas, owner: npt.NDArray[np.integer], num_ranks: int) -> float:
    loads = np.bincount(owner, weights=areas, minlength=num_ranks)
    return float(loads.max() * num_ranks / max(loads.sum(), 1.0))


def _num_bytes(rings: tuple[Runs, ...]) -> int:
    return RUN_BYTES * sum(map(len, rings))


@kept_up_to(8 << 20, _num_bytes)
def balanced_rings(
    documents: Boundaries, num_ranks: int, causal: bool = True, ranks_per_node: int | None = None
) -> tuple[Runs, ...]:
    """The runs of every ring rank, ascending.

    Args:
        documents: boundaries with the leading 0 and the total.
        causal: causal attention within documents, else full.
        ranks_per_node: ring ranks per node, None if unknown; parts of one document are then kept within one node
            where possible.
    """
    lengths = np.diff(np.array(documents, dtype=np.int64)).tolist()
    work, sizes = TokenWork(lengths, causal), split_sizes(documents[-1], num_ranks)
    mean = sum(work.area(number, 0, length) for number, length in enumerate(lengths)) / num_ranks
    best: tuple[int, list[list[Part]]] | None = None
    for goal in GOALS:
        shares, largest = fill_ranks(work, sizes, int(goal * mean), int(SLACK * mean))
        if best is None or largest < best[0]:
            best = largest, shares
        if largest <= GOOD * mean:
            break
    assert best is not None
    shares = best[1] if ranks_per_node is None else within_nodes(best[1], ranks_per_node, causal)
    return tuple(_runs(parts, documents) for parts in shares)


def _runs(parts: list[Part], documents: Boundaries) -> Runs:
    """Where the parts lie in the row, those that touch as one."""
    held = sorted([(documents[number] + first, documents[number] + last) for number, first, last in parts])
    return join(held)


def balanced_by_mask(mask: SliceMask, seq_len: int, num_ranks: int) -> tuple[Runs, ...]:
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


def _dealt(areas: Areas, num_larger: int, num_ranks: int) -> Integers:
    """The rank of every chunk. The first ``num_larger`` chunks have one more token: they are dealt first, so that the
    ranks' token counts differ by at most one.
    """
    order = np.lexsort((-areas, np.arange(len(areas)) >= num_larger))
    turn = np.arange(len(areas)) % (2 * num_ranks)
    owner = np.empty(len(areas), dtype=np.int64)
    owner[order] = np.where(turn < num_ranks, turn, 2 * num_ranks - 1 - turn)
    return owner
