"""Attention of one block in plain torch operations, for every device and dtype: exact, but slower than a fused kernel.

It computes what a device's own kernel does not support: dropout, value dimensions that differ from the key's, float32,
float64. It works in the accumulation dtype, one tile of query rows at a time, so at most TILE_ELEMENTS scores exist at
once.
"""

from collections.abc import Iterator
from typing import Any

import torch

from mindspeed_cp.kernels.base import (
    AttentionKernel,
    AttentionRows,
    BlockResult,
    BlockTensors,
    Gradients,
    KernelOptions,
    accumulation_dtype,
)

TILE_ELEMENTS = 1 << 22


def build() -> AttentionKernel:
    return BlockwiseKernel()


def unavailable() -> str:
    return ""


def band_mask(
    num_queries: int, num_keys: int, lower: int | None, upper: int | None, device: torch.device
) -> torch.Tensor:
    """Bool (num_queries, num_keys), True where key j is hidden from query i: not lower <= j - i <= upper."""
    offset = torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device).unsqueeze(1)
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=device)
    if lower is not None:
        hidden |= offset < lower
    if upper is not None:
        hidden |= offset > upper
    return hidden


class BlockwiseKernel(AttentionKernel):
    name = "blockwise"
    native_bands = True

    def forward(self, tensors: BlockTensors, options: KernelOptions) -> BlockResult:
        query, key, value = tensors.query, tensors.key, tensors.value
        dtype = accumulation_dtype(query.dtype)
        num_queries, batch, heads, _ = query.shape
        out = query.new_empty((num_queries, batch, heads, value.shape[-1]), dtype=dtype)
        lse = query.new_empty((num_queries, batch, heads), dtype=dtype)
        seed = int(torch.randint(1 << 62, ())) + options.rng_stream if options.dropout_p else None
        generator = _generator(seed, query.device)
        for tile in _tiles(tensors):
            scores = tile.scores(query, key, options.softmax_scale)
            tile_lse = torch.logsumexp(scores, dim=-1)
            # A row without keys has only scores of -inf and lse -inf; with 0 for lse, exp(score - lse) is 0, not NaN.
            probs = scores.sub_(tile_lse.masked_fill(tile_lse == -torch.inf, 0).unsqueeze(-1)).exp_()
            probs = _dropped(probs, options.dropout_p, generator)
            out[tile.q] = tile.to_rows(probs @ tile.heads_first(value[tile.k]))
            lse[tile.q] = tile_lse.permute(3, 0, 1, 2).flatten(2)
        return BlockResult(out, lse, seed)

    def backward(self, tensors: BlockTensors, rows: AttentionRows, options: KernelOptions, saved: Any) -> Gradients:
        query, key, value = tensors.query, tensors.key, tensors.value
        dtype = accumulation_dtype(query.dtype)
        dq = torch.zeros(query.shape, dtype=dtype, device=query.device)
        dk = torch.zeros(key.shape, dtype=dtype, device=key.device)
        dv = torch.zeros(value.shape, dtype=dtype, device=value.device)
        generator = _generator(saved, query.device)
        for tile in _tiles(tensors):
            scores = tile.scores(query, key, options.softmax_scale)
            probs = scores.sub_(tile.grouped_rows(rows.lse).unsqueeze(-1)).exp_()
            grad = tile.grouped(rows.grad_out)
            delta = (grad * tile.grouped(rows.out)).sum(-1, keepdim=True)
            dprobs = grad @ tile.heads_first(value[tile.k]).transpose(-1, -2)
            if options.dropout_p:
                keep = _dropped(torch.ones_like(probs), options.dropout_p, generator)
                dv[tile.k] += tile.to_key_rows((probs * keep).transpose(-1, -2) @ grad)
                dprobs *= keep
            else:
                dv[tile.k] += tile.to_key_rows(probs.transpose(-1, -2) @ grad)
            dscores = dprobs.sub_(delta).mul_(probs).mul_(options.softmax_scale)
            dq[tile.q] += tile.to_rows(dscores @ tile.heads_first(key[tile.k]))
            dk[tile.k] += tile.to_key_rows(dscores.transpose(-1, -2) @ tile.grouped(query))
        return dq, dk, dv


class _Tile:
    """A tile: some query rows of one piece, and all keys of that piece.

    The grouped form of a tensor is (batch, kv_heads, group, rows, dim).
    """

    def __init__(self, q: slice, k: slice, hidden: torch.Tensor | None, kv_heads: int, dtype: torch.dtype) -> None:
        self.q, self.k, self.hidden, self.kv_heads, self.dtype = q, k, hidden, kv_heads, dtype

    def grouped(self, tensor: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = tensor[self.q].to(self.dtype).unflatten(2, (self.kv_heads, -1))
        return rows.permute(1, 2, 3, 0, 4)

    def grouped_rows(self, lse: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = lse[self.q].unflatten(2, (self.kv_heads, -1))
        return rows.permute(1, 2, 3, 0)

    def heads_first(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.dtype).permute(1, 2, 0, 3).unsqueeze(2)

    def to_rows(self, grouped: torch.Tensor) -> torch.Tensor:
        return grouped.permute(3, 0, 1, 2, 4).flatten(2, 3)

    def to_key_rows(self, grouped: torch.Tensor) -> torch.Tensor:
        return grouped.sum(2).permute(2, 0, 1, 3)

    def scores(self, query: torch.Tensor, key: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        scores = (self.grouped(query) * softmax_scale) @ self.heads_first(key[self.k]).transpose(-1, -2)
        return scores if self.hidden is None else scores.masked_fill_(self.hidden, -torch.inf)


def _tiles(tensors: BlockTensors) -> Iterator[_Tile]:
    query, key, block, attention_mask = tensors.query, tensors.key, tensors.block, tensors.attention_mask
    dtype = accumulation_dtype(query.dtype)
    _, batch, heads, _ = query.shape
    for q, k in block.pieces():
        rows, cols = q.stop - q.start, k.stop - k.start
        step = max(1, TILE_ELEMENTS // max(1, batch * heads * cols))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            hidden = None
            if not block.is_full:
                shift = None if block.lower is None else block.lower + start
                reach = None if block.upper is None else block.upper + start
                hidden = band_mask(stop - start, cols, shift, reach, query.device)
            if attention_mask is not None:
                dense = attention_mask[:, q.start + start : q.start + stop, k][:, None, None]
                hidden = dense if hidden is None else dense | hidden
            yield _Tile(slice(q.start + start, q.start + stop), k, hidden, key.shape[2], dtype)


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device=device).manual_seed(seed)


def _dropped(probs: torch.Tensor, dropout_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Zero each entry with probability dropout_p and scale the others by 1 / (1 - dropout_p), in place."""
    if not dropout_p:
        return probs
    keep = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=torch.float32) >= dropout_p
    return probs.mul_(keep).div_(1 - dropout_p) if dropout_p < 1 else probs.zero_()
