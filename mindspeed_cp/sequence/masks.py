"""What queries may see: masks described by intervals, from mask types, windows and documents, and dense masks."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from mindspeed_cp.sequence.blocks import IntervalMask


def interval_masks(
    causal: bool,
    seq_len: int,
    batch: int = 1,
    cu_seqlens: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
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


def _rows_of_boundaries(cu_seqlens, batch):
    """The boundaries of every row, or of all rows at once."""
    several = isinstance(cu_seqlens, (tuple, list)) and any(
        isinstance(row, (tuple, list, torch.Tensor)) for row in cu_seqlens
    )
    if not several:
        return [_boundaries(cu_seqlens)]
    if len(cu_seqlens) != batch:
        raise ValueError(
            f"cu_seqlens holds {len(cu_seqlens)} rows of boundaries and the batch has {batch}; pass one row for each "
            "row of the batch, or a single row for all."
        )
    return [_boundaries(row) for row in cu_seqlens]


@lru_cache(maxsize=256)
def _interval_mask(causal, seq_len, left, right, cu_seqlens):
    if cu_seqlens is not None:
        if len(cu_seqlens) < 2 or cu_seqlens[0] != 0:
            raise ValueError(
                f"cu_seqlens {_short(cu_seqlens)} must start with 0 and hold at least one document; "
                "prepend the leading 0."
            )
        if any(after < before for before, after in zip(cu_seqlens, cu_seqlens[1:])):
            raise ValueError(f"cu_seqlens {_short(cu_seqlens)} must not descend; pass cumulative document lengths.")
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


def _boundaries(cu_seqlens):
    if cu_seqlens is None:
        return None
    numbers = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    if not isinstance(numbers, (tuple, list)) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(
            f"cu_seqlens {cu_seqlens} must be one row of whole numbers, the document boundaries from 0 to the total, "
            "or a list of such rows, one for each row of the batch."
        )
    return tuple(numbers)


def _short(numbers):
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def dense_mask(attention_mask, batch, seq_len):
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
