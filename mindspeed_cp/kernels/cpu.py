"""The CPU kernel: torch's own flash attention operator, float64 included.

The operator wants (batch, heads, seq, dim) with any strides, so the sequence-first tensors go in as views. A KV head
that serves several query heads is expanded with stride 0, never copied. It has no dropout and wants dk == dv: those
cases take the blockwise path, which is exact and slower. Where the processor has no instructions for half precision its
backward pass takes 8 to 20 times as long as in float32 (and forward in float16 1.5 times); there a block's tensors are
converted first. With such instructions half precision is the faster, and most where each head of K and V is contiguous.
"""

import platform
from functools import cache

import torch

from mindspeed_cp.kernels.blockwise import BlockwiseKernel, band_mask
from mindspeed_cp.settings.notices import warn_rank0

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Queries of torch.cpu: instructions on x86 with which the operator multiplies half precision as it is.
HALF_INSTRUCTIONS = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def build():
    return CpuKernel()


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether a block is faster in float32 than in this dtype: half precision on x86 without instructions for it."""
    if dtype not in HALF_INSTRUCTIONS or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not any(getattr(torch.cpu, query, lambda: False)() for query in HALF_INSTRUCTIONS[dtype])


def unavailable():
    return ""


class CpuKernel:
    name = "cpu"
    native_bands = False

    def __init__(self):
        self._blockwise = BlockwiseKernel()

    def memory_order(self, dtype):
        # A row stride of a power of two maps a head's rows to few sets of the cache: up to 9 % slower.
        return None if is_slow(dtype) else "heads"

    def forward(self, query, key, value, block, options, attention_mask=None):
        if _needs_blockwise(key, value, options):
            _announce_blockwise(options)
            return self._blockwise.forward(query, key, value, block, options, attention_mask)
        if is_slow(query.dtype):
            query, key, value = query.float(), key.float(), value.float()
        if block.num_pieces == 1:
            return *_forward_piece(query, key, value, block, options, attention_mask), None
        parts = [_forward_piece(query[q], key[k], value[k], block, options, None) for q, k in block.pieces()]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]), None

    def backward(self, grad_out, query, key, value, out, lse, block, options, rng, attention_mask=None):
        if _needs_blockwise(key, value, options):
            return self._blockwise.backward(grad_out, query, key, value, out, lse, block, options, rng, attention_mask)
        if is_slow(query.dtype):
            grad_out, query, key, value, out = (tensor.float() for tensor in (grad_out, query, key, value, out))
        if block.num_pieces == 1:
            return _backward_piece(grad_out, query, key, value, out, lse, block, options, attention_mask)
        grads = [
            _backward_piece(grad_out[q], query[q], key[k], value[k], out[q], lse[q], block, options, None)
            for q, k in block.pieces()
        ]
        return tuple(torch.cat(parts) for parts in zip(*grads))


def _needs_blockwise(key, value, options):
    return options.dropout_p > 0 or key.shape[-1] != value.shape[-1]


def _announce_blockwise(options):
    reason = "dropout" if options.dropout_p else "a value head dimension that differs from the key's"
    warn_rank0(
        f"--cp-kernel cpu: torch's CPU flash attention does not take {reason}; the exact and slower blockwise kernel "
        "computes it (--cp-kernel blockwise chooses it outright)."
    )


def _group_queries(tensor, kv_heads):
    """(seq, batch, heads, ...) -> (batch * kv_heads, group, seq, ...); a view where batch and heads can be merged."""
    seq, batch, heads = tensor.shape[:3]
    return tensor.reshape(seq, batch * kv_heads, heads // kv_heads, *tensor.shape[3:]).movedim(0, 2)


def _expand_keys(tensor, group):
    """(seq, batch, kv_heads, dim) -> (batch * kv_heads, group, seq, dim), stride 0 over the group."""
    seq, batch, kv_heads, dim = tensor.shape
    return tensor.reshape(seq, batch * kv_heads, 1, dim).movedim(0, 2).expand(-1, group, -1, -1)


def _views(query, key, value):
    """The operator's views; without grouped heads batch and heads stay apart, which any stride allows."""
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    if group == 1:
        return tuple(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return _group_queries(query, kv_heads), _expand_keys(key, group), _expand_keys(value, group)


def _hidden(query, key, block, attention_mask):
    """Bool (1 or batch, nq, nk) of a tile or a dense mask; None for shapes that the operator knows."""
    if attention_mask is None and (block.is_full or block.is_causal):
        return None
    if block.is_full:
        return attention_mask
    band = band_mask(query.shape[0], key.shape[0], block.lower, block.upper, query.device)[None]
    return band if attention_mask is None else attention_mask | band


def _batch_rows(query, key, attention_mask):
    """Slices of the batch to compute apart: the operator takes a mask for each row and grouped heads only as copies of
    the mask for every KV head; a mask of one row serves them with stride 0. One slice where that does not arise.
    """
    if attention_mask is None or attention_mask.shape[0] == 1 or query.shape[2] == key.shape[2]:
        return [slice(None)]
    return [slice(row, row + 1) for row in range(query.shape[1])]


def _additive_mask(hidden, query, key):
    """0 and -inf, with stride 0 over the heads; None without a mask."""
    if hidden is None:
        return None
    num_queries, batch, heads, _ = query.shape
    num_keys, _, kv_heads, _ = key.shape
    mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)
    mask = mask.expand(batch, kv_heads, -1, -1)
    return mask if heads == kv_heads else mask.reshape(batch * kv_heads, 1, num_queries, num_keys)


def _forward_piece(query, key, value, block, options, attention_mask):
    rows = _batch_rows(query, key, attention_mask)
    if len(rows) > 1:
        parts = (
            _forward_piece(query[:, row], key[:, row], value[:, row], block, options, attention_mask[row])
            for row in rows
        )
        return tuple(torch.cat(part, 1) for part in zip(*parts))
    hidden = _hidden(query, key, block, attention_mask)
    mask = _additive_mask(hidden, query, key)
    is_causal = block.is_causal and mask is None
    out, lse = _forward(*_views(query, key, value), 0.0, is_causal, attn_mask=mask, scale=options.softmax_scale)
    seq, batch, heads = query.shape[:3]
    out = out.movedim(2, 0).reshape(seq, batch, heads, -1)
    lse = lse.movedim(2, 0).reshape(seq, batch, heads)
    if hidden is not None:
        # The operator gives rows without a key a finite lse, so they are found from the mask itself.
        empty = hidden.all(-1).t().unsqueeze(-1)
        out, lse = out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _backward_piece(grad_out, query, key, value, out, lse, block, options, attention_mask):
    rows, tensors = _batch_rows(query, key, attention_mask), (grad_out, query, key, value, out, lse)
    if len(rows) > 1:
        parts = (
            _backward_piece(*(tensor[:, row] for tensor in tensors), block, options, attention_mask[row])
            for row in rows
        )
        return tuple(torch.cat(part, 1) for part in zip(*parts))
    mask = _additive_mask(_hidden(query, key, block, attention_mask), query, key)
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    if group == 1:
        rows = [tensor.permute(1, 2, 0, 3) for tensor in (grad_out, out)] + [lse.permute(1, 2, 0)]
    else:
        rows = [_group_queries(tensor, kv_heads) for tensor in (grad_out, out, lse)]
    is_causal = block.is_causal and mask is None
    dq, dk, dv = _backward(
        rows[0],
        *_views(query, key, value),
        rows[1],
        rows[2],
        0.0,
        is_causal,
        attn_mask=mask,
        scale=options.softmax_scale,
    )
    if group == 1:
        return tuple(grad.permute(2, 0, 1, 3) for grad in (dq, dk, dv))
    dk, dv = (grad.sum(1).movedim(1, 0).reshape(like.shape) for grad, like in ((dk, key), (dv, value)))
    return dq.movedim(2, 0).reshape(query.shape), dk, dv
