"""One attention call of one rank, run by the engine itself on tensors without memory and links that only take notes.

So the predicted bytes are those of the engine's own code: nothing of its planning is written a second time.
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
from mindspeed_cp.comm.meter import count_bytes
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
    """The attention of one layer on the ranks of one tensor-parallel place.

    Args:
        heads, kv_heads: of a tensor-parallel rank.
        cu_seqlens: document boundaries with the leading 0 and the total, those of every row where they differ, or None.
        attention_slices: what queries see, in one list for all rows, or None where mask type and documents say it.
        windowed: (tokens that a query sees, share of the layers that are so limited), of models that mix both kinds.
        latent: (elements of the keys' rotated part, of the latent), of multi-latent attention.
        linear: (a layer with a state, share of the layers that are one), of models that mix both kinds.
        layer: what this layer is where it is no dense attention; sizes of heads are then those in it.
        is_pipeline: of which the first stage alone knows where documents end.
        stride: global ranks between neighbours of the context-parallel group, the tensor-parallel size in Megatron.
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
        """The documents by which the layout may go: every stage of a pipeline and every row must have the same."""
        if self.is_pipeline or self.cu_seqlens is None or not isinstance(self.cu_seqlens[0], int):
            return None
        return self.cu_seqlens

    def layout(self, config: ContextParallelConfig) -> SequenceLayout:
        slices = None if self.is_pipeline else self.attention_slices
        return SequenceLayout.build(config, self.seq_len, self.layout_documents, slices)

    def expansion(self, config: ContextParallelConfig, notes: "Notes", local_tokens: int = 0) -> "Expansion | None":
        """What makes keys and values of what travels; None where they travel themselves.

        Args:
            local_tokens: of the rank that notes.
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
        """What travels of a token at least, as key and value."""
        heads = self.kv_heads * (self.dk + self.dv)
        return min(heads, sum(self.latent)) if self.latent is not None and cp > 1 else heads

    def row_elements(self, config: ContextParallelConfig) -> int:
        """What travels of a token around a ring."""
        if self.latent is not None and self.expansion(config, Notes()) is not None:
            return sum(self.latent)
        return self.kv_heads * (self.dk + self.dv)


DEVICES = "dry"


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, eq=False)
class NotingLink(Link):
    """A link that packs and unpacks as any other, moves nothing and notes what it would have moved.

    Args:
        like: the back end as whose link it transfers; a name that the engine knows nothing of stands for those of
            devices, which all do the same.
        of_heads: it is the link of a Ulysses group.
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
    """Tokens of the shorter side of a block's pieces: the mean with which its time is that of the pieces one by one."""
    sides = [(rows.stop - rows.start, cols.stop - cols.start) for rows, cols in block.pieces()]
    if len(sides) == 1:
        return float(min(sides[0]))
    return float(sum(rows * cols for rows, cols in sides) / max(sum(max(pair) for pair in sides), 1))


@dataclass
class NotingKernel(AttentionKernel):
    """A kernel that computes nothing and notes its FLOPs: two for each multiply-add of the matrix products."""

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
        # Scores again, their gradient, and the gradients of query, key and value.
        flops = 2 * tensors.block.area * batch * heads * (3 * dk + 2 * value.shape[-1])
        self.notes.events.append(Compute(flops, shorter_side(tensors.block), dk))
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@dataclass(frozen=True, eq=False)
class NotingExpansion(LatentExpansion):
    """One that notes what it computes beyond the layer's own projection, which is counted with the layer's others.

    Args:
        left: (rows x heads) of that which are still to come, forward and backward.
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
    """The groups of cp_rank ``rank``, with the ranks that ``ContextParallelGroups.build`` would give them."""
    everyone = [place * stride for place in range(config.context_parallel_size)]
    if len(everyone) == 1:
        return ContextParallelGroups(config.hierarchy, 0, (0,))
    ulysses, _, windows = config.hierarchy
    workspace = Workspace()

    def link(name: str, ranks: Sequence[int]) -> NotingLink:
        place = list(ranks).index(everyone[rank])
        of_heads = name == "ulysses" or (name == "cp" and ulysses == len(everyone))
        return NotingLink(cast(Any, None), place, tuple(ranks), workspace, notes=notes, like=backend, of_heads=of_heads)

    links: dict[str, Any] = {
        name: link(name, ranks) for name, ranks in parts_of([everyone], ulysses, windows) if everyone[rank] in ranks
    }
    if ulysses in (1, len(everyone)):
        links["ring" if ulysses == 1 else "ulysses"] = links["cp"]
    return ContextParallelGroups(
        config.hierarchy, rank, tuple(everyone), workspace=workspace, topology=dry_topology(config), **links
    )


@dataclass(frozen=True, eq=False)
class DryCall:
    """An attention call on tensors without memory, as often as wanted; ``leaves`` are query, key and value for it."""

    leaves: tuple[torch.Tensor, ...]
    groups: ContextParallelGroups
    keywords: dict[str, Any]

    def __call__(self, *tensors: torch.Tensor, kept: KeptAttention | None = None) -> torch.Tensor:
        return context_parallel_attention(*tensors, groups=self.groups, **self.keywords, kept=kept)


def _forget(leaf: torch.Tensor) -> None:
    leaf.grad = None


def dry_call(
    config: ContextParallelConfig, problem: Problem, rank: int, kernel: NotingKernel, backend: str = DEVICES
) -> DryCall:
    """The call of cp_rank ``rank``; its links note where the kernel notes."""
    layout = problem.layout(config)
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
        leaf.register_post_accumulate_grad_hook(_forget)
    keywords = dict(
        config=config,
        layout=layout,
        cu_seqlens=problem.cu_seqlens,
        sliding_window=problem.sliding_window,
        layer_number=problem.layer_number,
        kernel=kernel,
        fused_update=True,
        expand=expansion,
        attention_slices=problem.attention_slices,
    )
    return DryCall(leaves, dry_groups(config, rank, problem.stride, kernel.notes, backend), keywords)


def dry_rank(config: ContextParallelConfig, problem: Problem, rank: int, notes: Notes) -> DryRank:
    """cp_rank ``rank`` of a layer that is no dense attention, which goes on across documents that differ by row."""
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
    """What cp_rank ``rank`` does in the (forward, backward) pass of one attention layer. Needs no processes.

    Raises:
        ValueError: the problem does not fit the configuration; it is the engine's own error.
    """
    notes = Notes()
    if problem.layer is not None:
        dry = dry_rank(config, problem, rank, notes)
        if isinstance(problem.layer, LinearLayer):
            return linear_passes(problem.layer, dry)
        return sparse_passes(problem.layer, dry)
    call = dry_call(config, problem, rank, NotingKernel(notes))
    with count_bytes() as forward:
        out = call(*call.leaves)
    passed = len(notes.events)
    with count_bytes() as backward:
        out.backward(out)
    return Pass(notes.events[:passed], forward), Pass(notes.events[passed:], backward)
