"""One attention call of one rank, run by the engine itself on tensors without memory and links that only take notes.

So the predicted bytes are those of the engine's own code: nothing of its planning is written a second time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

from mindspeed_cp.api import context_parallel_attention
from mindspeed_cp.comm.counters import Traffic, count_bytes, record
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.messages import Pending
from mindspeed_cp.comm.workspace import Workspace
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.groups import ContextParallelGroups, parts_of
from mindspeed_cp.kernels.base import KernelOptions, MemoryOrder, accumulation_dtype
from mindspeed_cp.layout import SequenceLayout


@dataclass(frozen=True)
class Problem:
    """The attention of one layer on the ranks of one tensor-parallel place.

    Args:
        heads, kv_heads: of a tensor-parallel rank.
        cu_seqlens: document boundaries with the leading 0 and the total, or None.
        stride: global ranks between neighbours of the context-parallel group, the tensor-parallel size in Megatron.
    """

    seq_len: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    cu_seqlens: tuple[int, ...] | None = None
    sliding_window: tuple[int | None, int | None] | None = None
    stride: int = 1
    layer_number: int = 1


@dataclass(frozen=True)
class Compute:
    flops: int


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

    def transfer(self, sent: dict[int, int], received: dict[int, int], result: Any = None) -> Pending[Any]:
        number = len(self.events)
        self.events.append(Post(number, {r: n for r, n in sent.items() if n}, {r: n for r, n in received.items() if n}))

        def finish() -> Any:
            self.events.append(Wait(number))
            return result

        return Pending(finish)


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, eq=False)
class NotingLink(Link):
    """A link that moves nothing and notes what it would have moved."""

    notes: Notes = field(default_factory=Notes)

    def exchange(self, sends, receives, purpose):
        for _, tensors in sends:
            if size := _num_bytes(tensors):
                record({purpose.partition(".")[0]: size})
        sent, received = (
            {self.global_ranks[rank]: _num_bytes(tensors) for rank, tensors in ends} for ends in (sends, receives)
        )
        return self.notes.transfer(sent, received)

    def gather(self, tensor, lengths, purpose, name=None, count=True):
        gathered = tensor.new_empty((self.size, max(lengths), *tensor.shape[1:]))
        size = _num_bytes([gathered[0]])
        if count:
            record({purpose.partition(".")[0]: size * (self.size - 1)})
        moved = {self.global_ranks[rank]: size for rank in self.peers}
        shards = [shard[:length] for shard, length in zip(gathered, lengths)]
        return self.notes.transfer(moved, dict(moved), shards)

    def all_to_all(self, leaving, arriving, purpose, stamp=None, check=None):
        sent, received = (
            {self.global_ranks[rank]: messages[rank].num_bytes for rank in self.peers}
            for messages in (leaving, arriving)
        )
        return self.notes.transfer(sent, received)


@dataclass
class NotingKernel:
    """A kernel that computes nothing and notes its FLOPs: two for each multiply-add of the matrix products."""

    notes: Notes
    name: str = "dry"
    native_bands: bool = True
    order: MemoryOrder | None = None

    def memory_order(self, dtype):
        return self.order

    def forward(self, query, key, value, block, options: KernelOptions, attention_mask=None):
        _, batch, heads, dk = query.shape
        dv = value.shape[-1]
        self.notes.events.append(Compute(2 * block.area * batch * heads * (dk + dv)))
        lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
        return query.new_empty((*query.shape[:-1], dv)), lse, None

    def backward(self, grad_out, query, key, value, out, lse, block, options, rng, attention_mask=None):
        _, batch, heads, dk = query.shape
        # Scores again, their gradient, and the gradients of query, key and value.
        self.notes.events.append(Compute(2 * block.area * batch * heads * (3 * dk + 2 * value.shape[-1])))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def dry_groups(config: ContextParallelConfig, rank: int, stride: int, notes: Notes) -> ContextParallelGroups:
    """The groups of cp_rank ``rank``, with the ranks that ``ContextParallelGroups.build`` would give them."""
    everyone = [place * stride for place in range(config.context_parallel_size)]
    if len(everyone) == 1:
        return ContextParallelGroups(config.hierarchy, 0, (0,))
    ulysses, _, windows = config.hierarchy
    workspace = Workspace()

    def link(ranks: Sequence[int]) -> NotingLink:
        return NotingLink(cast(Any, None), list(ranks).index(everyone[rank]), tuple(ranks), workspace, notes=notes)

    links: dict[str, Any] = {
        name: link(ranks) for name, ranks in parts_of([everyone], ulysses, windows) if everyone[rank] in ranks
    }
    if ulysses in (1, len(everyone)):
        links["ring" if ulysses == 1 else "ulysses"] = links["cp"]
    return ContextParallelGroups(config.hierarchy, rank, tuple(everyone), workspace=workspace, **links)


def dry_call(
    config: ContextParallelConfig, problem: Problem, rank: int, notes: Notes, order: MemoryOrder | None = None
) -> Callable[[], torch.Tensor]:
    """One attention call on tensors without memory, by a kernel that wants this order of memory."""
    layout = SequenceLayout.build(config, problem.seq_len, problem.cu_seqlens)
    sizes = ((problem.heads, problem.dk), (problem.kv_heads, problem.dk), (problem.kv_heads, problem.dv))
    leaves = (
        torch.empty((layout.length(rank), problem.batch, *size), dtype=problem.dtype, device="meta", requires_grad=True)
        for size in sizes
    )
    return partial(
        context_parallel_attention,
        *leaves,
        config=config,
        groups=dry_groups(config, rank, problem.stride, notes),
        layout=layout,
        cu_seqlens=problem.cu_seqlens,
        sliding_window=problem.sliding_window,
        layer_number=problem.layer_number,
        kernel=NotingKernel(notes, order=order),
    )


def trace(config: ContextParallelConfig, problem: Problem, rank: int) -> tuple[Pass, Pass]:
    """What cp_rank ``rank`` does in the (forward, backward) pass of one attention layer. Needs no processes.

    Raises:
        ValueError: the problem does not fit the configuration; it is the engine's own error.
    """
    notes = Notes()
    call = dry_call(config, problem, rank, notes)
    with count_bytes() as forward:
        out = call()
    passed = len(notes.events)
    with count_bytes() as backward:
        out.backward(torch.empty_like(out))
    return Pass(notes.events[:passed], forward), Pass(notes.events[passed:], backward)
