"""One attention call of one rank, run by the engine itself on tensors without memory and links that only take notes.

So the predicted bytes are those of the engine's own code: nothing of its planning is written a second time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist

from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.meter import Traffic, count_bytes
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
from mindspeed_cp.planner.cluster import HEAD_DIM
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig


@dataclass(frozen=True)
class Problem:
    """The attention of one layer on the ranks of one tensor-parallel place.

    Args:
        heads, kv_heads: of a tensor-parallel rank.
        cu_seqlens: document boundaries with the leading 0 and the total, those of every row where they differ, or None.
        windowed: (tokens that a query sees, share of the layers that are so limited), of models that mix both kinds.
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
    stride: int = 1
    layer_number: int = 1
    is_pipeline: bool = False

    @property
    def layout_documents(self) -> tuple[int, ...] | None:
        """The documents by which the layout may go: every stage of a pipeline and every row must have the same."""
        if self.is_pipeline or self.cu_seqlens is None or not isinstance(self.cu_seqlens[0], int):
            return None
        return self.cu_seqlens

    def layout(self, config: ContextParallelConfig) -> SequenceLayout:
        return SequenceLayout.build(config, self.seq_len, self.layout_documents)


LONG = 1 << 30  # tokens of a block that is long enough for any kernel
DEVICES = "dry"


@dataclass(frozen=True)
class Compute:
    """A block: its FLOPs, the shorter side of its pieces (their mean by what it costs a kernel), the size of a head."""

    flops: int
    tokens: float = LONG
    head_dim: int = HEAD_DIM


@dataclass(frozen=True)
class Post:
    """A transfer starts: bytes to and from every global rank."""

    number: int
    sent: dict[int, int]
    received: dict[int, int]


@dataclass(frozen=True)
class Wait:
    number: int


Event = Compute | Post | Wait


@dataclass
class Pass:
    """What one rank did in the forward or the backward pass, in order, and the bytes by purpose."""

    events: list[Event] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def sent(self) -> Counter[int]:
        """Bytes to every global rank."""
        total: Counter[int] = Counter()
        for event in self.events:
            if isinstance(event, Post):
                total.update(event.sent)
        return total


@dataclass(frozen=True)
class Notes:
    """Where links and kernel note what happens."""

    events: list[Event] = field(default_factory=list)

    def post(self, sent: dict[int, int], received: dict[int, int]) -> "Transfer":
        number = len(self.events)
        self.events.append(Post(number, {r: n for r, n in sent.items() if n}, {r: n for r, n in received.items() if n}))
        return Transfer(number, self.events)


@dataclass
class Transfer:
    """One that was posted, whatever the number of its works; only the first that is awaited waits."""

    number: int
    events: list[Event]
    is_over: bool = False

    def wait(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.events.append(Wait(self.number))


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, eq=False)
class NotingLink(Link):
    """A link that packs and unpacks as any other, moves nothing and notes what it would have moved.

    Args:
        like: the back end as whose link it transfers; a name that the engine knows nothing of stands for those of
            devices, which all do the same.
    """

    notes: Notes = field(default_factory=Notes)
    like: str = DEVICES

    @property
    def backend(self) -> str:
        return self.like

    def post(self, ops: Sequence[Posted], purpose: str) -> list[Work]:
        sent, received = (
            {self.global_ranks[op.rank]: _num_bytes(op.tensor) for op in ops if op.how is how}
            for how in (dist.isend, dist.irecv)
        )
        transfer = self.notes.post(sent, received)
        return [Work(transfer, [op.rank], [op.tensor]) for op in ops]

    def _gather_at_once(self, gathered: torch.Tensor, own: torch.Tensor, purpose: str) -> Callable[[], None]:
        moved = {self.global_ranks[rank]: _num_bytes(own) for rank in self.peers}
        return self.notes.post(moved, moved).wait

    def _trade_at_once(
        self, received: torch.Tensor, sent: torch.Tensor, sizes: list[list[int]], purpose: str
    ) -> Callable[[], None]:
        even = [sent.numel() // self.size] * self.size
        arriving, leaving = (
            {self.global_ranks[rank]: count[rank] * sent.element_size() for rank in self.peers}
            for count in sizes or (even, even)
        )
        return self.notes.post(leaving, arriving).wait


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


def dry_groups(
    config: ContextParallelConfig, rank: int, stride: int, notes: Notes, backend: str = DEVICES
) -> ContextParallelGroups:
    """The groups of cp_rank ``rank``, with the ranks that ``ContextParallelGroups.build`` would give them."""
    everyone = [place * stride for place in range(config.context_parallel_size)]
    if len(everyone) == 1:
        return ContextParallelGroups(config.hierarchy, 0, (0,))
    ulysses, _, windows = config.hierarchy
    workspace = Workspace()

    def link(ranks: Sequence[int]) -> NotingLink:
        place = list(ranks).index(everyone[rank])
        return NotingLink(cast(Any, None), place, tuple(ranks), workspace, notes=notes, like=backend)

    links: dict[str, Any] = {
        name: link(ranks) for name, ranks in parts_of([everyone], ulysses, windows) if everyone[rank] in ranks
    }
    if ulysses in (1, len(everyone)):
        links["ring" if ulysses == 1 else "ulysses"] = links["cp"]
    topology = "switch" if config.topology == "auto" else config.topology
    return ContextParallelGroups(
        config.hierarchy, rank, tuple(everyone), workspace=workspace, topology=topology, **links
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
    )
    return DryCall(leaves, dry_groups(config, rank, problem.stride, kernel.notes, backend), keywords)


def trace(config: ContextParallelConfig, problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """What cp_rank ``rank`` does in the (forward, backward) pass of one attention layer. Needs no processes.

    Raises:
        ValueError: the problem does not fit the configuration; it is the engine's own error.
    """
    notes = Notes()
    call = dry_call(config, problem, rank, NotingKernel(notes))
    with count_bytes() as forward:
        out = call(*call.leaves)
    passed = len(notes.events)
    with count_bytes() as backward:
        out.backward(out)
    return Pass(notes.events[:passed], forward), Pass(notes.events[passed:], backward)
