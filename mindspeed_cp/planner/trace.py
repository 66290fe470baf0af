"""One attention call of one rank, run by the engine itself on meta tensors and links that only record messages.

So the predicted bytes come from the engine's own code, and none of its planning is duplicated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist

from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.attention.exchange_choice import sends_latents
from mindspeed_cp.attention.expansion import Expansion, LatentExpansion, Pair, Sums
from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.comm.groups import ContextParallelGroups, Linkage
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.parts import parts_of
from mindspeed_cp.comm.posting import Posted, Work
from mindspeed_cp.comm.workspace import Workspace
from mindspeed_cp.kernels.base import (
    AttentionKernel,
    AttentionRows,
    BlockResult,
    BlockTensors,
    Gradients,
    KernelOptions,
    MemoryOrder,
    accumulation_dtype,
)
from mindspeed_cp.planner.events import Compute, Notes, Pass, Product
from mindspeed_cp.planner.other_layers import DryRank, LinearLayer, SparseLayer, linear_passes, sparse_passes
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.slice_mask import AttentionSlices
from mindspeed_cp.settings.config import ContextParallelConfig


@dataclass(frozen=True)
class Problem:
    """The attention of one layer on the ranks with one tensor-parallel rank.

    Args:
        heads, kv_heads: of a tensor-parallel rank.
        cu_seqlens: document boundaries with the leading 0 and the total, one tuple per row if they differ, or None.
        attention_slices: one list of slices for all rows, or None if mask type and documents define the mask.
        windowed: (tokens that a query sees, fraction of layers with this window), for models that mix both kinds.
        latent: (elements of the keys' rotated part, of the latent), for multi-latent attention.
        is_pipeline: whether there is a pipeline, in which only the first stage knows where documents end.
        stride: distance in global ranks between neighbours of the context-parallel group; Megatron's tp size.
        linear: (a layer with a state, fraction of the layers that are one), for models that mix both kinds.
        layer: what this layer is if it is not dense attention; it has the sizes of its heads itself.
    """

    seq_len: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    cu_seqlens: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    sliding_window: tuple[int | None, int | None] | None = None
    windowed: tuple[int, float] | None = None
    latent: tuple[int, int] | None = None
    stride: int = 1
    layer_number: int = 1
    is_pipeline: bool = False
    attention_slices: AttentionSlices | None = None
    linear: tuple[LinearLayer, float] | None = None
    layer: LinearLayer | SparseLayer | None = None

    @property
    def layout_documents(self) -> tuple[int, ...] | None:
        """Documents that the layout may use: all pipeline stages and all rows must have the same."""
        if self.is_pipeline or self.cu_seqlens is None or not isinstance(self.cu_seqlens[0], int):
            return None
        return self.cu_seqlens

    def layout(self, config: ContextParallelConfig) -> SequenceLayout:
        slices = None if self.is_pipeline else self.attention_slices
        return SequenceLayout.build(config, self.seq_len, self.layout_documents, slices)

    def expansion(self, config: ContextParallelConfig, notes: Notes, local_tokens: int = 0) -> Expansion | None:
        """Return what computes keys and values from the tensors sent; None if keys and values themselves are sent.

        Args:
            local_tokens: of the traced rank.
        """
        if self.latent is None:
            return None
        (rope, rank), nope = self.latent, self.dk - self.latent[0]
        weight = torch.nn.Parameter(torch.empty((self.heads * (nope + self.dv), rank), dtype=self.dtype, device="meta"))
        done = local_tokens * self.batch * self.heads
        expansion = NotingExpansion(weight, self.heads, nope, rope, self.dv, notes=notes, left=[done, done])
        topology = dry_topology(config)
        return expansion if sends_latents(config, expansion, topology, self.dtype.itemsize) else None

    def least_row_elements(self, cp: int) -> int:
        """Least number of elements sent per token, as key and value."""
        heads = self.kv_heads * (self.dk + self.dv)
        return min(heads, sum(self.latent)) if self.latent is not None and cp > 1 else heads

    def row_elements(self, config: ContextParallelConfig) -> int:
        """Number of elements sent per token around a ring."""
        if self.latent is not None and self.expansion(config, Notes()) is not None:
            return sum(self.latent)
        return self.kv_heads * (self.dk + self.dv)


DEVICES = "dry"


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, eq=False)
class NotingLink(Link):
    """A link that packs and unpacks like any other, but records what it would send instead of sending it.

    Args:
        like: back end whose behaviour it has; a name unknown to the engine represents those of devices, which all
            behave alike.
        of_heads: whether it is the link of a Ulysses group.
    """

    notes: Notes = field(default_factory=Notes)
    like: str = DEVICES
    of_heads: bool = False

    @property
    def backend(self) -> str:
        return self.like

    def post(self, ops: Sequence[Posted], purpose: str) -> list[Work]:
        sent, received = (
            {self.global_ranks[op.rank]: _num_bytes(op.tensor) for op in ops if op.how is how}
            for how in (dist.isend, dist.irecv)
        )
        transfer = self.notes.post(sent, received, self.of_heads)
        return [Work(transfer, [op.rank], [op.tensor]) for op in ops]

    def _gather_at_once(self, gathered: torch.Tensor, own: torch.Tensor, purpose: str) -> Callable[[], None]:
        moved = {self.global_ranks[rank]: _num_bytes(own) for rank in self.peers}
        return self.notes.post(moved, moved, self.of_heads).wait

    def _trade_at_once(
        self, received: torch.Tensor, sent: torch.Tensor, sizes: list[list[int]], purpose: str
    ) -> Callable[[], None]:
        even = [sent.numel() // self.size] * self.size
        arriving, leaving = (
            {self.global_ranks[rank]: count[rank] * sent.element_size() for rank in self.peers}
            for count in sizes or (even, even)
        )
        return self.notes.post(leaving, arriving, self.of_heads).wait


def shorter_side(block: Block) -> float:
    """Shorter side of a block's pieces in tokens: the mean that gives the same time as the pieces one by one."""
    sides = [(rows.stop - rows.start, cols.stop - cols.start) for rows, cols in block.pieces()]
    if len(sides) == 1:
        return float(min(sides[0]))
    return float(sum(rows * cols for rows, cols in sides) / max(sum(max(pair) for pair in sides), 1))


@dataclass
class NotingKernel(AttentionKernel):
    """A kernel that computes nothing and records its FLOPs: two for each multiply-add of the matrix products."""

    notes: Notes
    order: MemoryOrder | None = None
    name: str = "dry"
    native_bands: bool = True

    has_fused_merge: bool = True

    def memory_order(self, dtype: torch.dtype) -> MemoryOrder | None:
        return self.order

    def forward(self, tensors: BlockTensors, options: KernelOptions) -> BlockResult:
        query = tensors.query
        _, batch, heads, dk = query.shape
        dv = tensors.value.shape[-1]
        flops = 2 * tensors.block.area * batch * heads * (dk + dv)
        self.notes.events.append(Compute(flops, shorter_side(tensors.block), dk))
        lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
        return BlockResult(query.new_empty((*query.shape[:-1], dv)), lse)

    def merge(self, out: torch.Tensor, lse: torch.Tensor, statistics: Any, block: BlockResult) -> Any:
        return None

    def backward(self, tensors: BlockTensors, rows: AttentionRows, options: KernelOptions, saved: Any) -> Gradients:
        query, key, value = tensors.query, tensors.key, tensors.value
        _, batch, heads, dk = query.shape
        # Recomputed scores, their gradient, and the gradients of query, key and value.
        flops = 2 * tensors.block.area * batch * heads * (3 * dk + 2 * value.shape[-1])
        self.notes.events.append(Compute(flops, shorter_side(tensors.block), dk))
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@dataclass(frozen=True, eq=False)
class NotingExpansion(LatentExpansion):
    """An expansion that records its products beyond the layer's own projection, which is counted with the layer.

    Args:
        left: remaining (rows x heads) of the layer's own projection, forward and backward.
    """

    notes: Notes = field(default_factory=Notes)
    left: list[int] = field(default_factory=lambda: [0, 0])

    def expand(self, rows: Pair, order: MemoryOrder | None = None) -> Pair:
        self._note(rows, 0, 1)
        return super().expand(rows, order)

    def gradients(self, rows: Pair, grads: Pair, sums: Sums) -> Pair:
        self._note(rows, 1, 2)
        return super().gradients(rows, grads, sums)

    def _note(self, rows: Pair, way: int, products: int) -> None:
        count = rows[1].shape[0] * rows[1].shape[1]
        counted = min(self.left[way], count * self.kv_heads)
        self.left[way] -= counted
        flops = products * self.flops * (count * self.kv_heads - counted) // max(self.kv_heads, 1)
        if flops:
            columns = min(self.weight.shape[1], self.kv_heads * (self.nope + self.dv))
            self.notes.events.append(Product(flops, count, columns))


def dry_topology(config: ContextParallelConfig) -> Linkage:
    return "switch" if config.topology == "auto" else config.topology


def dry_groups(
    config: ContextParallelConfig, rank: int, stride: int, notes: Notes, backend: str = DEVICES
) -> ContextParallelGroups:
    """Return the groups of cp_rank ``rank``, with the same ranks as from ``ContextParallelGroups.build``."""
    everyone = [place * stride for place in range(config.context_parallel_size)]
    if len(everyone) == 1:
        return ContextParallelGroups(config.hierarchy, 0, (0,))
    ulysses, workspace = config.hierarchy[0], Workspace()

    def link(name: str, ranks: Sequence[int]) -> NotingLink:
        place = list(ranks).index(everyone[rank])
        of_heads = name == "ulysses" or (name == "cp" and ulysses == len(everyone))
        return NotingLink(cast(Any, None), place, tuple(ranks), workspace, notes=notes, like=backend, of_heads=of_heads)

    parts = parts_of([everyone], [config.hierarchy])
    links: dict[str, Any] = {name: link(name, ranks) for name, ranks in parts if everyone[rank] in ranks}
    if ulysses in (1, len(everyone)):
        links["ring" if ulysses == 1 else "ulysses"] = links["cp"]
    return ContextParallelGroups(
        config.hierarchy, rank, tuple(everyone), workspace=workspace, topology=dry_topology(config), **links
    )


@dataclass(frozen=True, eq=False)
class DryCall:
    """A repeatable attention call on meta tensors; ``leaves`` are its query, key and value."""

    leaves: tuple[torch.Tensor, ...]
    groups: ContextParallelGroups
    keywords: dict[str, Any]

    def __call__(self, *tensors: torch.Tensor, kept: KeptAttention | None = None) -> torch.Tensor:
        return context_parallel_attention(*tensors, groups=self.groups, **self.keywords, kept=kept)


def dry_call(
    config: ContextParallelConfig, problem: Problem, rank: int, kernel: NotingKernel, backend: str = DEVICES
) -> DryCall:
    """The call of cp_rank ``rank``; its links note where the kernel notes."""
    layout, config = problem.layout(config), config.of_layer(problem.layer_number)
    layout = layout.of_degree(config.hierarchy[0])
    sizes = ((problem.heads, problem.dk), (problem.kv_heads, problem.dk), (problem.kv_heads, problem.dv))
    expansion = problem.expansion(config, kernel.notes, layout.length(rank))
    if expansion is not None:
        rope, latent = expansion.widths
        sizes = ((problem.heads, problem.dk), (1, rope), (1, latent))
    leaves = tuple(
        torch.empty((layout.length(rank), problem.batch, *size), dtype=problem.dtype, device="meta", requires_grad=True)
        for size in sizes
    )
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
    given = ("cu_seqlens", "sliding_window", "layer_number", "attention_slices")
    keywords = {name: getattr(problem, name) for name in given}
    keywords |= dict(config=config, layout=layout, kernel=kernel, fused_update=True, expand=expansion)
    return DryCall(leaves, dry_groups(config, rank, problem.stride, kernel.notes, backend), keywords)


def dry_rank(config: ContextParallelConfig, problem: Problem, rank: int, notes: Notes) -> DryRank:
    """Return cp_rank ``rank`` of a layer other than dense attention; documents that differ between rows are ignored."""
    documents = problem.cu_seqlens if problem.cu_seqlens and isinstance(problem.cu_seqlens[0], int) else None
    return DryRank(
        config,
        dry_groups(config, rank, problem.stride, notes),
        problem.layout(config),
        documents or (0, problem.seq_len),
        problem.batch,
        problem.dtype,
        problem.stride > 1,
        notes,
    )


def trace(config: ContextParallelConfig, problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """Return the events of cp_rank ``rank`` in the (forward, backward) pass of one attention layer; needs no processes.

    Raises:
        ValueError: the problem does not fit the configuration (the engine's own error).
    """
    notes = Notes()
    if problem.layer is not None:
        dry = dry_rank(config, problem, rank, notes)
        if isinstance(problem.layer, LinearLayer):
            return linear_passes(problem.layer, dry)
        return sparse_passes(problem.layer, dry)
    call = dry_call(config, problem, rank, NotingKernel(notes))
    return notes.passes(call, *call.leaves)
