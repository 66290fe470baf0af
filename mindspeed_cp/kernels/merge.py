"""Merge attention over disjoint sets of keys, and sum in a wider dtype, in chunks that fit a CPU's cache."""

import torch

CHUNK_ELEMENTS = 1 << 17  # a converted chunk of 512 KiB stays in a core's second-level cache


def row_chunks(tensor: torch.Tensor) -> list[slice]:
    """Slices of the first dimension, each of about CHUNK_ELEMENTS; on accelerators, one slice for the whole tensor.

    There the conversion is fused with the arithmetic, and many small launches would cost more.
    """
    rows = tensor.shape[0]
    if tensor.device.type != "cpu" or tensor.numel() <= CHUNK_ELEMENTS:
        return [slice(0, rows)]
    step = max(1, CHUNK_ELEMENTS * rows // tensor.numel())
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def add_in_place(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part; both (seq, ...), part in the same or a lower precision."""
    if part.dtype == total.dtype:
        total.add_(part)
        return
    # On the CPU, an addition of mixed dtypes first converts the whole operand into new memory; page faults dominate.
    for rows in row_chunks(total):
        total[rows].add_(part[rows].to(total.dtype))


def merge_attention(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Combine attention over two disjoint sets of keys into attention over their union, in place.

    Args:
        out, block_out: (seq, batch, heads, head_dim); out is float32 (float64 for float64), block_out any float dtype.
        lse, block_lse: (seq, batch, heads) float32 or float64, natural-log sum of exp of the scaled scores; -inf where
            a row saw no key.

    Source: the log-sum-exp identity of FlashAttention-2, appendix B; sigmoid form, which cannot overflow.
    """
    # -inf - -inf is NaN if neither side saw a key; any weight is correct then, because both outputs are 0.
    weight = torch.sigmoid(torch.nan_to_num_(block_lse - lse, nan=0.0, posinf=torch.inf, neginf=-torch.inf))
    weight = weight.unsqueeze(-1)
    for rows in row_chunks(out):
        out[rows].lerp_(block_out[rows].to(out.dtype), weight[rows])
    torch.logaddexp(lse, block_lse, out=lse)
