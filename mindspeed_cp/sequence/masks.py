"""Masks of an attention call: slices from mask type, window, documents and given slices; and dense masks."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from mindspeed_cp.sequence.cache import INT_BYTES, kept_up_to
from mindspeed_cp.sequence.runs import Boundaries, boundaries
from mindspeed_cp.sequence.slice_mask import (
    AttentionSlice,
    AttentionSlices,
    SliceMask,
    document_mask,
    frozen,
    slices_mask,
)

GivenBoundaries = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None
GivenSlices = Sequence[AttentionSlice] | Sequence[Sequence[AttentionSlice]] | None
T = TypeVar("T")
SLICE_BYTES = 400  # three tuples of Python ints


def attention_masks(
    causal: bool,
    seq_len: int,
    batch: int = 1,
    cu_seqlens: GivenBoundaries = None,
    sliding_window: tuple[int | None, int | None] | None = None,
    attention_slices: GivenSlices = None,
) -> tuple[SliceMask, ...]:
    """What queries may see: one mask for all rows of the batch, or one mask per row.

    Args:
        causal: whether attention without slices is causal; each slice has its own kind.
        cu_seqlens, sliding_window: document boundaries, and (left, right); both apply on top of the slices.

    Raises:
        ValueError: cu_seqlens does not start with 0, descends or does not end with ``seq_len``; cu_seqlens or slices
            are given for another number of rows; the window or a slice is malformed; slices overlap.
    """
    window = (None, None) if sliding_window is None else sliding_window
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or any(side is not None and (not isinstance(side, int) or side < -1) for side in window)
    ):
        raise ValueError(
            f"sliding_window {sliding_window} must be two whole numbers of at least 0, or -1 or None for no limit."
        )
    left, right = (None if side in (None, -1) else side for side in window)
    documents = _rows_of_boundaries(cu_seqlens, batch)
    if attention_slices is None:
        right = 0 if causal else right
        masks = tuple(_document_mask(seq_len, left, right, row) for row in documents)
    else:
        slices = rows_of_slices(attention_slices, batch)
        count = max(len(documents), len(slices))
        pairs = zip(_repeated(documents, count), _repeated(slices, count))
        masks = tuple(_slices_mask(seq_len, left, right, *pair) for pair in pairs)
    return masks if len(set(masks)) > 1 else masks[:1]


def _repeated(rows: list[T], count: int) -> list[T]:
    return rows if len(rows) == count else rows * count


def _rows_of_boundaries(cu_seqlens: Any, batch: int) -> list[Boundaries | None]:
    """The boundaries of every row, or one list for all rows."""
    if cu_seqlens is None:
        return [None]
    several = isinstance(cu_seqlens, (tuple, list)) and any(
        isinstance(row, (tuple, list, torch.Tensor)) for row in cu_seqlens
    )
    if not several:
        if isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dim() != 1:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and must be one row of boundaries; pass a list of "
                "rows where the rows of the batch hold different documents."
            )
        return [boundaries(cu_seqlens)]
    if len(cu_seqlens) != batch:
        raise ValueError(
            f"cu_seqlens holds {len(cu_seqlens)} rows of boundaries and the batch has {batch}; pass one row for each "
            "row of the batch, or a single row for all."
        )
    return [boundaries(row) for row in cu_seqlens]


def rows_of_slices(attention_slices: Any, batch: int) -> list[AttentionSlices]:
    """The slices of every row, or one list for all rows, in a hashable form."""
    given = frozen(attention_slices)
    parts = given if isinstance(given, tuple) else (given,)
    strange = [part for part in parts if not isinstance(part, tuple)]
    if not strange and not _can_be_looked_up(parts):
        strange = [part for part in parts if not _can_be_looked_up(part)]
    if strange:
        raise ValueError(
            f"attention_slices is or holds {strange[0]!r}, and must be a list of ((first query, last + 1), (first key, "
            "last + 1), kind), or one such list for each row of the batch; not arrays."
        )
    one = any(len(row) == 3 and not isinstance(row[2], tuple) for row in given)
    if one or not given:
        return [given]
    if len(given) != batch:
        raise ValueError(
            f"attention_slices holds {len(given)} lists of slices and the batch has {batch} rows; pass one list for "
            "each row of the batch, or a single list of ((first query, last + 1), (first key, last + 1), kind) for all."
        )
    return list(given)


def _can_be_looked_up(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _num_bytes(mask: SliceMask) -> int:
    return mask.num_bytes + INT_BYTES * len(mask)


@kept_up_to(8 << 20, _num_bytes)
def _document_mask(seq_len: int, left: int | None, right: int | None, cu_seqlens: Boundaries | None) -> SliceMask:
    return document_mask(left, right, (0, seq_len) if cu_seqlens is None else _of_length(cu_seqlens, seq_len))


def _bytes_with_slices(mask: SliceMask) -> int:
    return mask.num_bytes + SLICE_BYTES * len(mask)


@kept_up_to(8 << 20, _bytes_with_slices)
def _slices_mask(
    seq_len: int, left: int | None, right: int | None, cu_seqlens: Boundaries | None, slices: AttentionSlices
) -> SliceMask:
    mask = slices_mask(slices, seq_len)
    mask = mask if cu_seqlens is None else mask.within(_of_length(cu_seqlens, seq_len))
    return mask.in_window(left, right)


def _of_length(cu_seqlens: Boundaries, seq_len: int) -> Boundaries:
    if cu_seqlens[-1] != seq_len:
        raise ValueError(
            f"cu_seqlens ends with {cu_seqlens[-1]} and must end with the sequence length {seq_len}; "
            "add a last document for the padding, or build the layout for the documents' total."
        )
    return cu_seqlens


def dense_mask(attention_mask: torch.Tensor | None, batch: int, seq_len: int) -> torch.Tensor | None:
    """(S, S) or (batch, 1, S, S) -> (1 or batch, S, S)."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask has dtype {attention_mask.dtype} and must be bool, True = masked out; compare it first."
        )
    if shape == (seq_len, seq_len):
        return attention_mask[None]
    if shape not in ((batch, 1, seq_len, seq_len), (1, 1, seq_len, seq_len)):
        raise ValueError(
            f"attention_mask has shape {shape} and must be the mask of the whole sequence, ({seq_len}, {seq_len}) "
            f"or ({batch}, 1, {seq_len}, {seq_len}); do not split it over the ranks."
        )
    return attention_mask[:, 0]
