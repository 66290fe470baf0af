"""Layers other than dense attention: recurrent layers (with a state), and sparse attention, whose indexer selects keys.

The bytes are those that the engine's own code sends (``mindspeed_cp.linear``), run on meta tensors; kernel times are
estimated. b: batch, s: tokens of this rank, S: tokens of the sequence.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.sequence_exchange import SequenceExchange
from mindspeed_cp.kernels.base import accumulation_dtype
from mindspeed_cp.linear.gated_delta import DeltaHeads, DeltaLayer, DeltaWeights
from mindspeed_cp.linear.parts import OwnPart
from mindspeed_cp.linear.recurrence import DeltaRule, Documents
from mindspeed_cp.linear.rows import contiguous_parts, conversion, exchange_rows, whole_sequence
from mindspeed_cp.planner.events import Compute, Notes, Pass
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig

CHUNK = 64  # tokens per chunk of linear attention's chunked rule


@dataclass(frozen=True)
class LinearLayer:
    """A tensor-parallel rank's part of a layer with a state (gated delta net).

    Args:
        heads: heads of this rank. width: width of the convolution. hidden: width of the model.
    """

    heads: DeltaHeads
    width: int
    hidden: int

    @classmethod
    def of(cls, model: ModelShape, tp: int) -> "LinearLayer":
        linear = model.linear
        assert linear is not None, "the model has such layers"
        sizes = linear.key_dim, linear.value_dim, linear.decays
        return cls(DeltaHeads(linear.keys // tp, linear.values // tp, *sizes), linear.width, model.hidden)

    @property
    def token_elements(self) -> int:
        """Elements per token after the first projection: query, key, value, beta, alpha, output gate."""
        heads = self.heads
        return sum(heads.channels) + sum(heads.gates) + heads.values * heads.value_dim

    @property
    def saved_elements(self) -> int:
        """Elements per token that the backward pass needs: inputs and outputs of convolution and rule, and gates."""
        return self.token_elements + sum(self.heads.channels) + self.heads.values * self.heads.value_dim


@dataclass(frozen=True)
class SparseLayer:
    """Latent attention whose queries see selected keys (DSA).

    Args:
        heads: heads of this rank. rope, latent: elements of a key, all of which are sent.
        index_heads, index_dim: sizes of the indexer, whole on every tensor-parallel rank. topk: keys that a query sees.
        has_loss: whether the indexer is trained, so that gradients of its keys are sent back.
    """

    heads: int
    rope: int
    latent: int
    index_heads: int
    index_dim: int
    topk: int
    has_loss: bool = True

    @classmethod
    def of(cls, model: ModelShape, tp: int) -> "SparseLayer":
        indexer, latent = model.indexer, model.latent
        assert indexer is not None and latent is not None, "the model has an indexer over its latents"
        return cls(model.num_heads // tp, latent.rope, latent.kv_rank, indexer.heads, indexer.dim, indexer.topk)


@dataclass(frozen=True)
class DryRank:
    """One rank whose links record messages instead of sending them.

    Args:
        layout, documents: of the sequence. sequence_parallel: whether tensor parallelism splits rows between layers.
    """

    config: ContextParallelConfig
    groups: ContextParallelGroups
    layout: SequenceLayout
    documents: Documents
    batch: int
    dtype: torch.dtype
    sequence_parallel: bool
    notes: Notes

    @property
    def tokens(self) -> int:
        return self.layout.length(self.groups.cp_rank)

    def rows(self, *size: int) -> torch.Tensor:
        """Meta tensor (s, b, *size)."""
        shape = (self.tokens, self.batch, *size)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)


class _Noted(torch.autograd.Function):
    """Identity that records FLOPs in the forward pass, and twice as many in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, notes: Notes, compute: Compute) -> torch.Tensor:
        ctx.notes, ctx.compute = notes, compute
        notes.events.append(compute)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        ctx.notes.events.append(replace(ctx.compute, flops=2 * ctx.compute.flops))
        return grad, None, None


def linear_passes(layer: LinearLayer, rank: DryRank) -> tuple[Pass, Pass]:
    """Return both passes of a layer with a state, by heads or by states as the configuration says.

    Raises:
        ValueError: there are fewer heads than ranks.
    """
    heads, link, core = layer.heads, rank.groups.cp, _core(layer, rank)
    if link is not None and rank.config.linear_exchange == "state":
        return _by_state(layer, rank, core, link)
    inputs, gates = rank.rows(sum(heads.channels)), rank.rows(sum(heads.gates))
    if link is None:
        return rank.notes.passes(partial(_alone, core, rank.documents), inputs, gates)
    if heads.values < link.size:
        raise ValueError(f"{heads.values} value heads for {link.size} ranks; use --cp-linear-exchange state.")
    exchange = SequenceExchange(link, rank.layout.all_runs, rank.config.alltoall)
    return rank.notes.passes(partial(core.by_heads, exchange=exchange, documents=rank.documents), inputs, gates)


def _by_state(layer: LinearLayer, rank: DryRank, core: DeltaLayer, link: Link) -> tuple[Pass, Pass]:
    """Rows are exchanged before and after the layer; with sequence parallelism inside it, where they are gathered."""
    parts = contiguous_parts(rank.layout)
    there, back = conversion(rank.layout, parts), conversion(parts, rank.layout)
    part, values = OwnPart(link, parts, rank.documents), layer.heads.values * layer.heads.value_dim
    channels, gates = sum(layer.heads.channels), sum(layer.heads.gates)

    def inside(projected: torch.Tensor) -> torch.Tensor:
        moved = exchange_rows(projected, there, link, "tokens")
        inputs, alphas, gate = moved.split([channels, gates, values], dim=-1)
        return exchange_rows(core.by_state(inputs, alphas, part).flatten(2) + gate, back, link, "tokens")

    def around(hidden: torch.Tensor) -> torch.Tensor:
        moved = exchange_rows(hidden, there, link, "tokens").sum(-1, keepdim=True)
        out = core.by_state(moved.expand(-1, -1, channels), moved.expand(-1, -1, gates), part)
        rows = out.flatten(2).sum(-1, keepdim=True).expand(-1, -1, layer.hidden)
        return exchange_rows(rows.contiguous(), back, link, "tokens")

    if rank.sequence_parallel:
        return rank.notes.passes(inside, rank.rows(layer.token_elements))
    return rank.notes.passes(around, rank.rows(layer.hidden))


def _alone(core: DeltaLayer, documents: Documents, inputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    rows = core.prepared(inputs.transpose(0, 1), *gates.split(core.heads.gates, dim=-1))
    return core.recurrence.over_documents(rows, documents)[0]


def _core(layer: LinearLayer, rank: DryRank) -> DeltaLayer:
    heads = layer.heads

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=rank.dtype, device="meta")

    def rule(query: Any, key: Any, value: Any, *, g: Any, beta: Any, initial_state: Any, **more: Any) -> Any:
        """Record the FLOPs of the chunked rule; its results depend on all of its inputs."""
        (batch, tokens, count, size), columns = key.shape, value.shape[-1]
        flops = batch * tokens * count * (2 * CHUNK * (3 * size + 2 * columns) + 6 * size * columns + CHUNK**2)
        seen = (query + key).sum(-1) + beta + g.reshape(*beta.shape, -1).sum(-1)
        out = _Noted.apply((value * seen.unsqueeze(-1)).to(value.dtype), rank.notes, Compute(flops, CHUNK, size))
        wide = accumulation_dtype(rank.dtype)
        state = torch.einsum("bshk,bshv->bhkv", key.to(wide), value.to(wide))
        return out, state if initial_state is None else state + initial_state

    def convolve(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: Documents
    ) -> torch.Tensor:
        return rows * weight.sum()

    weights = DeltaWeights(
        weight(sum(heads.channels), layer.width), None, weight(heads.values), weight(heads.values * heads.decays)
    )
    return DeltaLayer(heads, weights, DeltaRule(rule, False, accumulation_dtype(rank.dtype)), convolve, None)


def sparse_passes(layer: SparseLayer, rank: DryRank) -> tuple[Pass, Pass]:
    """Return both passes of sparse attention, which gathers keys and the indexer's keys with every algorithm."""
    plan, link, width = whole_sequence(rank.layout), rank.groups.cp, layer.rope + layer.latent

    def computed(keys: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
        if link is not None:
            keys = exchange_rows(keys, plan, link, "kv")
            given = indexes if layer.has_loss else indexes.detach()
            indexes = exchange_rows(given, plan, link, "kv")
        shown, chosen = _seen(rank, layer.topk)
        scored = 2 * shown * rank.batch * layer.index_heads * layer.index_dim
        attended = 2 * chosen * rank.batch * layer.heads * (width + layer.latent)
        out = keys.sum() + indexes.sum()
        out = _Noted.apply(out, rank.notes, Compute(scored, head_dim=layer.index_dim))
        noted: torch.Tensor = _Noted.apply(out, rank.notes, Compute(attended, head_dim=layer.latent))
        return noted

    return rank.notes.passes(computed, rank.rows(1, width), rank.rows(layer.index_dim))


def _seen(rank: DryRank, topk: int) -> tuple[int, int]:
    """Return the numbers of (scored, selected) pairs of this rank's queries and keys in one row."""
    shown = chosen = 0
    for start, stop in rank.layout.runs(rank.groups.cp_rank):
        for low, high in zip(rank.documents, rank.documents[1:]):
            first, last = max(start, low) - low, min(stop, high) - low
            if first < last:
                whole = _triangle(last) - _triangle(first)
                shown += whole
                chosen += whole - (_triangle(max(last - topk, 0)) - _triangle(max(first - topk, 0)))
    return shown, chosen


def _triangle(count: int) -> int:
    return count * (count + 1) // 2
