"""Layouts in MindSpeed's orders: any lengths, several concatenated rows, every document in zigzag order."""

from itertools import pairwise
from typing import Any

import torch

from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.sequence import runs as ranges
from mindspeed_cp.sequence.cache import RUN_BYTES, kept_up_to
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import Boundaries, Run


def attention_of_rows(*tensors: torch.Tensor, flat: bool, **arguments: Any) -> torch.Tensor:
    """``context_parallel_attention``; if ``flat``, the rows of the batch are concatenated for it.

    Args:
        tensors: query, key and value, (seq, batch, heads, dim); for it, (batch * seq, 1, heads, dim).
    """
    if not flat:
        return context_parallel_attention(*tensors, **arguments)
    batch = tensors[0].size(1)
    one_row = (tensor.transpose(0, 1).flatten(0, 1).unsqueeze(1) for tensor in tensors)
    out: torch.Tensor = context_parallel_attention(*one_row, **arguments).squeeze(1).unflatten(0, (batch, -1))
    return out.transpose(0, 1)


def _num_bytes(layout: SequenceLayout) -> int:
    return 3 * RUN_BYTES * sum(map(len, layout.all_runs))


@kept_up_to(8 << 20, _num_bytes)
def row_layout(lengths: tuple[int, ...], zigzag: bool, rows: int) -> SequenceLayout:
    """Contiguous shards, or the two halves of every rank's tokens in zigzag order.

    Args:
        lengths: tokens of every rank.
        rows: number of such sequences that are concatenated.
    """
    size = len(lengths)
    mine: list[tuple[int, ...]]
    if zigzag:
        chunks = [length - length // 2 for length in lengths] + [length // 2 for length in reversed(lengths)]
        mine = [(rank, 2 * size - 1 - rank) for rank in range(size)]
    else:
        chunks, mine = list(lengths), [(rank,) for rank in range(size)]
    starts = ranges.offsets(chunks)

    def run(row: int, chunk: int) -> Run:
        return row * starts[-1] + starts[chunk], row * starts[-1] + starts[chunk + 1]

    return SequenceLayout(tuple(ranges.join(run(row, chunk) for row in range(rows) for chunk in own) for own in mine))


@kept_up_to(8 << 20, _num_bytes)
def document_layout(local_boundaries: Boundaries, size: int) -> SequenceLayout:
    """The two halves of every document; ``local_boundaries`` count the tokens of one rank."""
    documents = [row_layout((after - before,) * size, True, 1) for before, after in pairwise(local_boundaries)]
    return SequenceLayout(
        tuple(
            ranges.join(
                (size * first + start, size * first + stop)
                for first, document in zip(local_boundaries, documents, strict=False)
                for start, stop in document.runs(rank)
            )
            for rank in range(size)
        ),
    )
