"""Layouts in MindSpeed's orders: any lengths, several rows one after another, every document in zigzag order."""

from functools import lru_cache
from itertools import accumulate, pairwise

from mindspeed_cp.sequence.layout import SequenceLayout, join_runs


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
    return SequenceLayout(
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
    return SequenceLayout(
        tuple(
            join_runs(
                (size * first + start, size * first + stop)
                for first, document in zip(local_boundaries, documents, strict=False)
                for start, stop in document.runs(rank)
            )
            for rank in range(size)
        ),
    )
