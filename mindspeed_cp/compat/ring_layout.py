"""Layouts in MindSpeed's orders: any lengths, several rows one after another, every document in zigzag order."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from mindspeed_cp.layout import join_runs, run_positions


@dataclass(frozen=True)
class RunsLayout:
    """A layout given by its runs of global positions, for orders that SequenceLayout does not have."""

    seq_len: int
    all_runs: tuple
    ulysses_degree: int = 1

    @property
    def ring_size(self):
        return len(self.all_runs)

    def ring_runs(self, ring_rank):
        return self.all_runs[ring_rank]

    def length(self, cp_rank):
        return sum(stop - start for start, stop in self.all_runs[cp_rank])

    def positions(self, cp_rank, device):
        return run_positions(self.all_runs[cp_rank], device)


@lru_cache(maxsize=256)
def row_layout(lengths, zigzag, rows):
    """Contiguous shards, or the two halves of every rank's tokens in zigzag order.

    Args:
        lengths: tokens of every rank.
        rows: how many such sequences follow one another.
    """
    size = len(lengths)
    if zigzag:
        chunks = [length - length // 2 for length in lengths] + [length // 2 for length in reversed(lengths)]
        mine = [(rank, 2 * size - 1 - rank) for rank in range(size)]
    else:
        chunks, mine = lengths, [(rank,) for rank in range(size)]
    starts = [0, *accumulate(chunks)]
    return RunsLayout(
        rows * starts[-1],
        tuple(
            join_runs(
                (row * starts[-1] + starts[chunk], row * starts[-1] + starts[chunk + 1])
                for row in range(rows)
                for chunk in pair
            )
            for pair in mine
        ),
    )


@lru_cache(maxsize=256)
def document_layout(local_boundaries, size):
    """Both halves of every document, whose boundaries are counted in one rank's tokens."""
    documents = [row_layout((after - before,) * size, True, 1) for before, after in pairwise(local_boundaries)]
    return RunsLayout(
        size * local_boundaries[-1],
        tuple(
            join_runs(
                (size * first + start, size * first + stop)
                for first, document in zip(local_boundaries, documents, strict=False)
                for start, stop in document.ring_runs(rank)
            )
            for rank in range(size)
        ),
    )
