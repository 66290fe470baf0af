"""The balanced layout: chunks of a packed row shared out so that every ring rank computes the same area.

With documents the zigzag of the whole row is uneven: a token's work is its place in its document. Here the row is cut
into equal chunks, each rank gets equally many of them (memory and MLP stay even), and which ones follows from their
areas. Few rows have to travel when chunks of one document lie together, so among ranks of about equal load the one wins
that has the document already. The result depends on the boundaries alone, so that every rank finds it without asking.

Related: the dispatch solver of MagiAttention (arXiv 2505.13211), WLB-LLM (arXiv 2503.17924). n: ring ranks.
"""

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.cache import RUN_BYTES, kept_up_to
from mindspeed_cp.sequence.runs import Boundaries, Runs, offsets, split_sizes

Integers = npt.NDArray[np.int64]
Areas = npt.NDArray[np.float64]  # integers would overflow from 2**32 tokens on

CHUNKS_PER_RANK = (4, 8, 16, 32)  # more chunks balance better and make more and smaller blocks
GOOD = 1.02  # largest area over the mean that ends the search
SLACK = 0.02  # of a rank's mean area, given away to keep a document together
EXCHANGES = 200  # of two chunks between the fullest and another rank


class _Area:
    """How many (query, key) pairs the queries before a position see, with causal or full attention within documents."""

    def __init__(self, documents: Boundaries, causal: bool) -> None:
        self._ends, self._causal = np.unique(np.array(documents, dtype=np.int64)), causal
        self._before = np.concatenate([[0.0], np.cumsum(self._pairs(np.diff(self._ends), np.diff(self._ends)))])

    def _pairs(self, queries: Integers, keys: Integers) -> Areas:
        queries_, keys_ = queries.astype(np.float64), keys.astype(np.float64)
        return queries_ * (queries_ + 1) / 2 if self._causal else queries_ * keys_

    def document(self, positions: Integers) -> Integers:
        return np.clip(np.searchsorted(self._ends, positions, side="right") - 1, 0, len(self._ends) - 2)

    def __call__(self, positions: Integers) -> Areas:
        index = self.document(positions)
        start = self._ends[index]
        return self._before[index] + self._pairs(positions - start, self._ends[index + 1] - start)


def imbalance(rings: list[Runs], documents: Boundaries, causal: bool = True) -> float:
    """Largest area of a ring rank over the mean; ``rings`` are the runs of each."""
    area = _Area(documents, causal)
    loads = [float(sum(np.diff(area(np.array(run)))[0] for run in runs)) for runs in rings]
    return max(loads) * len(loads) / max(sum(loads), 1.0)


def _num_bytes(rings: tuple[Runs, ...]) -> int:
    return RUN_BYTES * sum(map(len, rings))


@kept_up_to(8 << 20, _num_bytes)
def balanced_rings(documents: Boundaries, num_ranks: int, causal: bool = True) -> tuple[Runs, ...]:
    """The runs of every ring rank, ascending.

    Args:
        documents: boundaries with the leading 0 and the total.
        causal: causal attention within documents, else full.
    """
    area, seq_len = _Area(documents, causal), documents[-1]
    best: tuple[float, Integers, Integers] | None = None
    for per_rank in CHUNKS_PER_RANK:
        cuts = np.array(offsets(split_sizes(seq_len, num_ranks * per_rank)))
        areas, homes = np.diff(area(cuts)), area.document(cuts[:-1])
        owner = _improved(_shared_out(areas, homes, np.diff(cuts), num_ranks), areas, np.diff(cuts), num_ranks)
        loads = np.bincount(owner, weights=areas, minlength=num_ranks)
        ratio = loads.max() / max(loads.mean(), 1.0)
        if best is None or ratio < best[0]:
            best = ratio, cuts, owner
        if ratio <= GOOD or seq_len < 2 * num_ranks * per_rank:
            break
    assert best is not None
    _, cuts, owner = best
    runs = list(zip(cuts[:-1].tolist(), cuts[1:].tolist()))
    return tuple(tuple(runs[chunk] for chunk in np.flatnonzero(owner == rank)) for rank in range(num_ranks))


def _shared_out(areas: Areas, homes: Integers, sizes: Integers, num_ranks: int) -> Integers:
    """The rank of every chunk: largest area first, to the emptiest rank, or one about as empty with the same document.

    Chunks of both sizes that occur are shared out evenly.
    """
    owner = np.empty(len(areas), dtype=np.int64)
    loads = np.zeros(num_ranks)
    slack = SLACK * areas.sum() / num_ranks
    larger = sizes > sizes.min()
    takes = np.array(split_sizes(int(larger.sum()), num_ranks))
    left = {True: takes, False: len(areas) // num_ranks - takes}
    holders: dict[int, Areas] = {}
    for chunk in np.argsort(-areas, kind="stable"):
        quota, home = left[bool(larger[chunk])], int(homes[chunk])
        held = holders.setdefault(home, np.zeros(num_ranks))
        free = np.where(quota > 0, loads, np.inf)
        near = free <= free.min() + slack
        rank = int(np.lexsort((free, -held * near, ~near))[0])
        owner[chunk] = rank
        quota[rank] -= 1
        loads[rank] += areas[chunk]
        held[rank] += 1
    return owner


def _improved(owner: Integers, areas: Areas, sizes: Integers, num_ranks: int) -> Integers:
    """Exchange chunks of one size between the fullest rank and others while that lowers the larger of the two loads."""
    loads = np.bincount(owner, weights=areas, minlength=num_ranks)
    for _ in range(EXCHANGES):
        full = int(loads.argmax())
        if loads[full] <= loads.mean() * (1 + (GOOD - 1) / 4):
            break
        mine = np.flatnonzero(owner == full)
        others = np.flatnonzero(owner != full)
        # Load that leaves the fullest rank when chunk i of it goes for chunk j; the best halves the difference.
        moved = areas[mine][:, None] - areas[others][None]
        after = np.maximum(loads[full] - moved, loads[owner[others]][None] + moved)
        after[sizes[mine][:, None] != sizes[others][None]] = np.inf
        best = int(after.argmin())
        i, j = divmod(best, len(others))
        if after[i, j] >= loads[full]:
            break
        give, take = mine[i], others[j]
        other = owner[take]
        loads[full] -= moved[i, j]
        loads[other] += moved[i, j]
        owner[give], owner[take] = other, full
    return owner
