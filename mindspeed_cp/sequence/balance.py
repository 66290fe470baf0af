"""The balanced layout: equal token counts and nearly equal areas on every ring rank, and few rows that travel.

With documents, a zigzag over the whole row is uneven, because a token's work is its position within its document. Here
every rank gets whole documents (mindspeed_cp/sequence/filling.py), and parts of those that are too long for one rank.
Short documents then send nothing, and long ones lie on as few ranks as balance allows. The result depends only on the
boundaries, so every rank computes the same layout without communication.

Related: the dispatch solver of MagiAttention (arXiv 2505.13211), WLB-LLM (arXiv 2503.17924). n: ring ranks.
"""

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.cache import RUN_BYTES, kept_up_to
from mindspeed_cp.sequence.filling import Part, TokenWork, fill_ranks
from mindspeed_cp.sequence.nodes import within_nodes
from mindspeed_cp.sequence.runs import Boundaries, Runs, join, split_sizes

Integers = npt.NDArray[np.int64]
Areas = npt.NDArray[np.float64]  # integers would overflow from 2**32 tokens on

GOOD = 1.05  # the search ends when the largest area is at most this multiple of the mean
GOALS = (1.04, 1.02, 1.0, 0.97)  # ranks are filled up to these multiples of the mean; higher goals cut fewer documents
SLACK = 0.0095  # a rank may exceed its goal by this, if a whole piece then fits; first goal + SLACK is below GOOD


class _Area:
    """Number of (query, key) pairs of all queries before a position, with causal or full attention within documents."""

    def __init__(self, documents: Boundaries, causal: bool) -> None:
        self._ends, self._causal = np.unique(np.array(documents, dtype=np.int64)), causal
        self._before = np.concatenate([[0.0], np.cumsum(self._pairs(np.diff(self._ends), np.diff(self._ends)))])

    @property
    def total(self) -> float:
        return float(self._before[-1])

    def _pairs(self, queries: Integers, keys: Integers) -> Areas:
        queries_, keys_ = queries.astype(np.float64), keys.astype(np.float64)
        return queries_ * (queries_ + 1) / 2 if self._causal else queries_ * keys_

    def __call__(self, positions: Integers) -> Areas:
        index = np.clip(np.searchsorted(self._ends, positions, side="right") - 1, 0, len(self._ends) - 2)
        start = self._ends[index]
        return self._before[index] + self._pairs(positions - start, self._ends[index + 1] - start)


def imbalance(rings: list[Runs], documents: Boundaries, causal: bool = True) -> float:
    """Largest area of a ring rank divided by the mean; ``rings`` holds the runs of each rank."""
    area = _Area(documents, causal)
    runs = np.array([run for runs in rings for run in runs], dtype=np.int64).reshape(-1, 2)
    owner = np.repeat(np.arange(len(rings)), list(map(len, rings)))
    loads = np.bincount(owner, weights=area(runs[:, 1]) - area(runs[:, 0]), minlength=len(rings))
    return float(loads.max() * len(rings) / max(loads.sum(), 1.0))


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
    mean = _Area(documents, causal).total / num_ranks
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
