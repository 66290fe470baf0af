"""The CPU kernel: torch's own flash attention operator, float64 included.

The operator takes (batch, heads, seq, dim) with any strides, so sequence-first tensors are passed as views. A KV head
that serves several query heads is expanded with stride 0, never copied. The operator has no dropout and requires
dk == dv; otherwise the exact but slower blockwise kernel is used. On processors without half-precision instructions,
the operator's backward takes 8 to 20 times as long as in float32 (and forward in float16 1.5 times), so tensors are
converted first. With these instructions half precision is faster, especially if each head of K and V is contiguous.
"""

import platform
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from mindspeed_cp.kernels.base import (
    AttentionKernel,
    AttentionRows,
    BlockResult,
    BlockTensors,
    Gradients,
    KernelOptions,
    MemoryOrder,
    joined,
)
from mindspeed_cp.kernels.blockwise import BlockwiseKernel, band_mask
from mindspeed_cp.settings.notices import warn_rank0

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Names of torch.cpu's queries for the x86 instructions with which the operator multiplies half precision natively.
HALF_INSTRUCTIONS = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def build() -> AttentionKernel:
    return CpuKernel()


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether float32 is faster than this dtype: half precision on an x86 processor without instructions for it."""
    if dtype not in HALF_INSTRUCTIONS or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    queries: list[Callable[[], bool]] = [getattr(torch.cpu, name, lambda: False) for name in HALF_INSTRUCTIONS[dtype]]
    return not any(query() for query in queries)


def unavailable() -> str:
    return ""


class CpuKernel(AttentionKernel):
    name = "cpu"

    def __init__(self) -> None:
        self._blockwise = BlockwiseKernel()

    def memory_order(self, dtype: torch.dtype) -> MemoryOrder | None:
        # A row stride that is a power of two maps a head's rows to few cache sets: up to 9 % slower.
        return None if is_slow(dtype) else "heads"

    def forward(self, tensors: BlockTensors, options: KernelOptions) -> BlockResult:
        if _needs_blockwise(tensors, options):
            _announce_blockwise(options)
            return self._blockwise.forward(tensors, options)
        tensors = _in_fast_dtype(tensors)
        parts = [_forward_piece(piece, options) for _, piece in _pieces(tensors)]
        outs, lses = zip(*parts)
        return BlockResult(joined(outs), joined(lses))

    def backward(self, tensors: BlockTensors, rows: AttentionRows, options: KernelOptions, saved: Any) -> Gradients:
        if _needs_blockwise(tensors, options):
            return self._blockwise.backward(tensors, rows, options, saved)
        if is_slow(tensors.query.dtype):
            tensors, rows = _in_fast_dtype(tensors), AttentionRows(rows.grad_out.float(), rows.out.float(), rows.lse)
        grads = [_backward_piece(piece, rows.cut(q), options) for q, piece in _pieces(tensors)]
        return _joined_gradients(grads, 0)


def _in_fast_dtype(tensors: BlockTensors) -> BlockTensors:
    if not is_slow(tensors.query.dtype):
        return tensors
    return tensors.with_tensors(tensors.query.float(), tensors.key.float(), tensors.value.float())


def _pieces(tensors: BlockTensors) -> list[tuple[slice, BlockTensors]]:
    """(query rows, tensors) of each piece, which takes one call of the operator."""
    if tensors.block.num_pieces == 1:
        return [(slice(None), tensors)]
    return [(q, tensors.cut(q, k)) for q, k in tensors.block.pieces()]


def _joined_gradients(parts: Sequence[Gradients], dim: int) -> Gradients:
    dq, dk, dv = (joined(grads, dim) for grads in zip(*parts))
    return dq, dk, dv


def _needs_blockwise(tensors: BlockTensors, options: KernelOptions) -> bool:
    return options.dropout_p > 0 or tensors.key.shape[-1] != tensors.value.shape[-1]


def _announce_blockwise(options: KernelOptions) -> None:
    reason = "dropout" if options.dropout_p else "a value head dimension that differs from the key's"
    warn_rank0(
        f"--cp-kernel cpu: torch's CPU flash attention does not take {reason}; the exact and slower blockwise kernel "
        "computes it (--cp-kernel blockwise chooses it outright)."
    )


def _group_queries(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(seq, batch, heads, ...) -> (batch * kv_heads, group, seq, ...); a view if batch and heads can be merged."""
    seq, batch, heads = tensor.shape[:3]
    return tensor.reshape(seq, batch * kv_heads, heads // kv_heads, *tensor.shape[3:]).movedim(0, 2)


def _expand_keys(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """(seq, batch, kv_heads, dim) -> (batch * kv_heads, group, seq, dim), stride 0 over the group."""
    seq, batch, kv_heads, dim = tensor.shape
    return tensor.reshape(seq, batch * kv_heads, 1, dim).movedim(0, 2).expand(-1, group, -1, -1)


def _views(tensors: BlockTensors) -> list[torch.Tensor]:
    """The operator's inputs; without grouped heads, batch and heads are not merged, so that any strides give views."""
    query, key, value = tensors.query, tensors.key, tensors.value
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    if group == 1:
        return [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    return [_group_queries(query, kv_heads), _expand_keys(key, group), _expand_keys(value, group)]


def _hidden(tensors: BlockTensors) -> torch.Tensor | None:
    """Bool (1 or batch, nq, nk), True = hidden, of a tile or dense mask; None for shapes that the operator supports."""
    block, mask = tensors.block, tensors.attention_mask
    if block.is_full or (block.is_causal and mask is None):
        return mask
    rows, cols = tensors.query.shape[0], tensors.key.shape[0]
    band = band_mask(rows, cols, block.lower, block.upper, tensors.query.device)[None]
    return band if mask is None else mask | band


def _batch_rows(tensors: BlockTensors) -> list[tuple[slice, BlockTensors]]:
    """Split the batch into its rows if each has a dense mask and heads are grouped, else return an empty list. With
    several rows the operator would need a copy of the mask for every KV head; with one row the mask has stride 0 there.
    """
    query, key, value, mask = tensors.query, tensors.key, tensors.value, tensors.attention_mask
    if mask is None or mask.shape[0] == 1 or query.shape[2] == key.shape[2]:
        return []
    rows = [slice(row, row + 1) for row in range(query.shape[1])]
    return [(row, BlockTensors(tensors.block, query[:, row], key[:, row], value[:, row], mask[row])) for row in rows]


def _additive_mask(hidden: torch.Tensor | None, tensors: BlockTensors) -> torch.Tensor | None:
    """The mask as 0 and -inf, with stride 0 over the heads; None without a mask."""
    if hidden is None:
        return None
    num_queries, batch, heads, _ = tensors.query.shape
    num_keys, _, kv_heads, _ = tensors.key.shape
    mask = torch.zeros(hidden.shape, dtype=tensors.query.dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)
    mask = mask.expand(batch, kv_heads, -1, -1)
    return mask if heads == kv_heads else mask.reshape(batch * kv_heads, 1, num_queries, num_keys)


def _forward_piece(tensors: BlockTensors, options: KernelOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one piece."""
    if apart := _batch_rows(tensors):
        outs, lses = zip(*(_forward_piece(part, options) for _, part in apart))
        return joined(outs, 1), joined(lses, 1)
    hidden = _hidden(tensors)
    mask = _additive_mask(hidden, tensors)
    is_causal = tensors.block.is_causal and mask is None
    out, lse = _forward(*_views(tensors), 0.0, is_causal, attn_mask=mask, scale=options.softmax_scale)
    seq, batch, heads = tensors.query.shape[:3]
    out = out.movedim(2, 0).reshape(seq, batch, heads, -1)
    lse = lse.movedim(2, 0).reshape(seq, batch, heads)
    if hidden is not None:
        # The operator returns a finite lse for rows without a key, so these rows are found from the mask.
        empty = hidden.all(-1).t().unsqueeze(-1)
        out, lse = out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _backward_piece(tensors: BlockTensors, rows: AttentionRows, options: KernelOptions) -> Gradients:
    grad_out, out, lse = rows.grad_out, rows.out, rows.lse
    if apart := _batch_rows(tensors):
        rows_of = ((part, AttentionRows(grad_out[:, row], out[:, row], lse[:, row])) for row, part in apart)
        return _joined_gradients([_backward_piece(*pair, options) for pair in rows_of], 1)
    key, mask = tensors.key, _additive_mask(_hidden(tensors), tensors)
    kv_heads, group = key.shape[2], tensors.query.shape[2] // key.shape[2]
    if group == 1:
        views = [grad_out.permute(1, 2, 0, 3), out.permute(1, 2, 0, 3), lse.permute(1, 2, 0)]
    else:
        views = [_group_queries(tensor, kv_heads) for tensor in (grad_out, out, lse)]
    is_causal = tensors.block.is_causal and mask is None
    dq, dk, dv = _backward(
        views[0],
        *_views(tensors),
        views[1],
        views[2],
        0.0,
        is_causal,
        attn_mask=mask,
        scale=options.softmax_scale,
    )
    if group == 1:
        return dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)
    dk, dv = (grad.sum(1).movedim(1, 0).reshape(like.shape) for grad, like in ((dk, key), (dv, tensors.value)))
    return dq.movedim(2, 0).reshape(tensors.query.shape), dk, dv
