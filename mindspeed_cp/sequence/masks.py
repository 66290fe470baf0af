"""What queries may see: masks described by intervals, from mask types, windows and documents, and dense masks."""

from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_cp.sequence.cache import INT_BYTES, kept_up_to
from mindspeed_cp.sequence.runs import Boundaries, boundaries
from mindspeed_cp.sequence.staircases import IntervalMask

GivenBoundaries = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None


def interval_masks(
    causal: bool,
    seq_len: int,
    batch: int = 1,
    cu_seqlens: GivenBoundaries = None,
    sliding_window: tuple[int | None, int | None] | None = None,
) -> tuple[IntervalMask, ...]:
    """What queries may see, from document boundaries and a (left, right) window: one mask for all rows, or one each.

    Raises:
        ValueError: cu_seqlens does not start with 0, descends, does not end with ``seq_len``, or is given for another
            number of rows; the window is malformed.
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
    rows = _rows_of_boundaries(cu_seqlens, batch)
    masks = tuple(_interval_mask(causal, seq_len, left, right, row) for row in rows)
    return masks if len(set(masks)) > 1 else masks[:1]


def _rows_of_boundaries(cu_seqlens: Any, batch: int) -> list[Boundaries | None]:
    """The boundaries of every row, or of all rows at once."""
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


def _num_bytes(mask: IntervalMask) -> int:
    return 2 * INT_BYTES * len(mask.cu_seqlens or ())


@kept_up_to(8 << 20, _num_bytes)
def _interval_mask(
    causal: bool, seq_len: int, left: int | None, right: int | None, cu_seqlens: Boundaries | None
) -> IntervalMask:
    if cu_seqlens is not None:
        if cu_seqlens[-1] != seq_len:
            raise ValueError(
                f"cu_seqlens ends with {cu_seqlens[-1]} and must end with the sequence length {seq_len}; "
                "add a last document for the padding, or build the layout for the documents' total."
            )
        # Empty documents hold no token; a single one is no boundary at all.
        cu_seqlens = tuple(dict.fromkeys(cu_seqlens))
        cu_seqlens = None if len(cu_seqlens) == 2 else cu_seqlens
    if left is not None and left >= seq_len - 1:
        left = None
    if right is not None and right >= seq_len - 1 > 0:
        right = None
    return IntervalMask(left, 0 if causal else right, cu_seqlens)


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
