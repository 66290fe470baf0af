"""Merging of partial attention results.

Shapes: out (seq, batch, heads, head_dim) and lse (seq, batch, heads), both in the accumulation dtype.
"""

import torch

from mindspeed_cp.accumulate import row_chunks


def merge_attention(out, lse, block_out, block_lse):
    """Combine attention over two disjoint sets of keys into attention over their union, in place.

    Args:
        out, block_out: (seq, batch, heads, head_dim); out is float32 (float64 for float64), block_out any float dtype.
        lse, block_lse: (seq, batch, heads) float32 or float64, natural-log sum of exp of the scaled scores; -inf where
            a row saw no key.

    Source: the log-sum-exp identity of FlashAttention-2, appendix B; sigmoid form, which cannot overflow.
    """
    # -inf - -inf is NaN where neither side saw a key; any weight is right there, because both outputs are 0.
    weight = torch.sigmoid(torch.nan_to_num_(block_lse - lse, nan=0.0, posinf=torch.inf, neginf=-torch.inf))
    weight = weight.unsqueeze(-1)
    for rows in row_chunks(out):
        out[rows].lerp_(block_out[rows].to(out.dtype), weight[rows])
    torch.logaddexp(lse, block_lse, out=lse)


def add_softmax_offset(out, lse, offset):
    """Let every row see one more key with score ``offset`` and value 0 (an attention sink), in place.

    Args:
        out, lse: as in ``merge_attention``.
        offset: (heads,) unscaled extra logit of each head.
    """
    offset = offset.to(lse.dtype)
    # A row without keys sees the sink alone: its out is 0 already, and sigmoid(-inf) keeps it so.
    out.mul_(torch.sigmoid(lse - offset).unsqueeze(-1))
    torch.logaddexp(lse, offset.expand_as(lse), out=lse)


def softmax_offset_gradient(grad_out, out, lse, offset):
    """Gradient (heads,) of ``add_softmax_offset``'s offset; out and lse are those that include it.

    The sink's value is 0, so the gradient of its score is -p * delta with p = exp(offset - lse), delta = sum(grad_out *
    out).
    """
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(torch.exp(offset.to(lse.dtype) - lse) * delta).sum((0, 1)).to(offset.dtype)
