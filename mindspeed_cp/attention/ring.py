"""The ring engine: one forward loop and one backward loop for every mask, exchange, window and cache policy.

A schedule brings the keys and values of one rank after another; the plan says which blocks to compute with this rank's
queries; the kernel computes each block; results are merged and gradients summed in the accumulation dtype. A ring of
one rank is the plain local attention that Ulysses needs.

Shapes: query (seq, batch, heads, dk), key (seq, batch, kv_heads, dk), value (seq, batch, kv_heads, dv), out
(seq, batch, heads, dv), lse (seq, batch, heads); seq is what this rank holds.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from mindspeed_cp.attention.arriving import Arrived, Expanding
from mindspeed_cp.attention.expansion import Expansion, Sums
from mindspeed_cp.attention.kv_cache import NAMES, Name
from mindspeed_cp.attention.merging import KVPartial, Merge, PartialAttention, RowSum, accumulator, plain_merge
from mindspeed_cp.attention.mesh_plan import MeshPlan, mesh_plan
from mindspeed_cp.attention.ring_plan import RingPlan, Task, ring_plan
from mindspeed_cp.comm.channel import RingChannel, Stream, Tensors, paired
from mindspeed_cp.comm.gradient_return import GradientReturn
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.kv_exchange import EXCHANGES
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.mesh_exchange import MeshReturn
from mindspeed_cp.comm.messages import packed
from mindspeed_cp.comm.meter import named, note_area
from mindspeed_cp.comm.schedule import RingPlace, Step
from mindspeed_cp.kernels.base import AttentionKernel, AttentionRows, BlockTensors, KernelOptions, MemoryOrder
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import Runs, length, positions
from mindspeed_cp.sequence.slice_mask import SliceMask
from mindspeed_cp.sequence.staircases import bounds_of_rows


@dataclass(frozen=True, eq=False)
class RingProblem:
    """Everything about one attention call that is not a tensor of the autograd graph.

    Args:
        layout: which global positions each ring rank holds.
        masks: what queries may see, one mask for all rows of the batch or one per row.
        dense_mask: None or bool (1 or batch, S, S), True = masked out, applied on top of them.
        exchange: how keys and values travel.
        keep: which received keys and values forward keeps; backward communicates the others again.
        overlap: whether transfers are posted before the block that hides them.
        order: the kernel's memory order.
        in_flight: steps that may be in flight at once, if nothing is forwarded.
    """

    groups: ContextParallelGroups
    layout: SequenceLayout
    masks: tuple[SliceMask, ...]
    kernel: AttentionKernel
    options: KernelOptions
    exchange: Literal["ring", "direct", "mesh", "allgather"] = "ring"
    keep: frozenset[Name] = frozenset()
    overlap: bool = False
    dense_mask: torch.Tensor | None = None
    merge: Merge = plain_merge
    order: MemoryOrder | None = None
    in_flight: int = 1
    plan: RingPlan = field(init=False)
    mesh: MeshPlan | None = field(init=False)
    channel: RingChannel = field(init=False)

    def __post_init__(self) -> None:
        dense, groups = self.dense_mask is not None, self.groups
        # Neither may refer to the problem: a reference cycle would keep it and its groups until garbage collection.
        exact = self.exchange in ("direct", "mesh") and not dense
        plan = ring_plan(self.layout, self.masks, self.kernel.native_bands, dense, exact)
        mesh = mesh_plan(plan, self.rank) if self.exchange == "mesh" and len(plan.lengths) > 1 else None
        ring, outer = cast(Link, groups.ring), cast(Link, groups.outer)  # used only if there is something to exchange
        channel = RingChannel(
            RingPlace(self.rank, *groups.hierarchy[1:]),
            ring,
            outer,
            plan.lengths,
            plan.rows_needed,
            self.overlap,
            self.order,
            self.in_flight,
            mesh.steps if mesh else (),
            # With one step under way nothing could go back meanwhile.
            plan.halves if self.exchange == "direct" and exact and self.in_flight > 1 else plan.wholes,
        )
        for name, value in (("plan", plan), ("mesh", mesh), ("channel", channel)):
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        return self.groups.ring_rank

    @property
    def steps(self) -> list[Step]:
        """The steps in order, starting with the rank's own shard."""
        if self.mesh is None:
            steps = list(self.channel.place.steps())
            if self.channel.num_pieces == 1:
                return steps
            return [steps[0], *(steps[t]._replace(piece=piece) for t, piece in self.channel.order_of_pieces)]
        return [Step(0, 0, self.rank), *(Step(0, place + 1, None) for place in range(len(self.mesh.steps)))]

    def tasks(self, query: torch.Tensor, step: Step) -> tuple[Task, ...]:
        """This rank's blocks at a step; none if uneven heads leave it without a head, which kernels do not support."""
        if not query.numel():
            return ()
        if step.source is None:
            assert self.mesh is not None
            return self.mesh.tasks(step.place - 1)
        half = None if step.place == 0 or self.channel.num_pieces == 1 else step.piece
        return self.plan.tasks(self.rank, step.source, half)

    def mask_against(self, step: Step) -> torch.Tensor | None:
        """The dense mask of this rank's queries against a step's keys, including ``masks``; None if there is none."""
        if self.dense_mask is None:
            return None
        device, query_runs = self.dense_mask.device, self.layout.ring_runs(self.rank)
        key_runs = self.channel.mesh[step.place - 1].keys if step.source is None else self.layout.ring_runs(step.source)
        queries, keys = (positions(runs, device) for runs in (query_runs, key_runs))
        hidden = self.dense_mask[:, queries][:, :, keys]
        return hidden | torch.stack([_hidden(query_runs, key_runs, mask, device) for mask in self.masks])

    def arrived(
        self, rows: Tensors, tasks: tuple[Task, ...], expansion: Expansion | None, sums: Sums = ()
    ) -> Arrived | Expanding:
        """The keys and values of a step, as its blocks read them."""
        first, second = rows
        if expansion is None:
            return Arrived((first, second), tasks)
        return Expanding((first, second), tasks, expansion, self.order, sums)

    def gradient_return(
        self, own: tuple[torch.Tensor, ...], like: tuple[torch.Tensor, ...]
    ) -> GradientReturn | MeshReturn:
        """The return of partial gradients that fits the exchange; see comm/gradient_return.py."""
        return (GradientReturn if self.mesh is None else MeshReturn)(self.channel, own, like)


def _hidden(query_runs: Runs, key_runs: Runs, mask: SliceMask, device: torch.device) -> torch.Tensor:
    """Bool (queries, keys): hidden by the mask. Used only together with a dense mask, which has that size anyway."""
    columns = torch.arange(length(key_runs), device=device)
    hidden = torch.ones(length(query_runs), len(columns), dtype=torch.bool, device=device)
    for bounds in bounds_of_rows(query_runs, key_runs, mask):
        lo, hi = (torch.from_numpy(bound).to(device).unsqueeze(1) for bound in bounds)
        hidden &= (columns < lo) | (columns >= hi)
    return hidden


def own_rows(
    problem: RingProblem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """This rank's query in the kernel's memory order, and key and value as they travel: packed into one message, unless
    exactly one of them is kept.
    """
    if problem.layout.ring_size == 1:
        return query, key, value
    if problem.order == "sequence":
        query = query.contiguous()
    if len(problem.keep) == 1:
        return query, *packed((key,), problem.order), *packed((value,), problem.order)
    return query, *packed((key, value), problem.order)


def ring_forward(
    problem: RingProblem, query: torch.Tensor, own: tuple[torch.Tensor, ...], expansion: Expansion | None = None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Attention of this rank's queries over all keys; ``own`` comes from ``own_rows``.

    Args:
        expansion: for this rank's heads, if other tensors than keys and values travel.

    Returns:
        (out, lse, saved, blocks): out is in the kernel's dtype if a single block computed it; else in the accumulation
        dtype, and then in reused memory unless that is the query's dtype. For backward, saved holds ``own`` and
        received keys and values that are kept; blocks holds what the kernel saved for each block.
    """
    note_area(lambda: problem.plan.area(problem.rank, query.shape[1]) * query.shape[2])
    dv = own[1].shape[-1] if expansion is None else expansion.dv
    partial = PartialAttention(problem.groups.workspace, problem.merge, query, dv)
    kept, blocks = [*own], []
    stream = _forward_stream(problem, own, kept)
    for step, source in zip(problem.steps, stream, strict=True):
        mask, tasks = problem.mask_against(step), problem.tasks(query, step)
        arrived = problem.arrived(source, tasks, expansion)
        for batch, block in tasks:
            rows, keys = block.query_rows, block.key_rows
            tensors = BlockTensors(block, query[rows, batch], *arrived.read(keys, batch), mask)
            with named("block forward"):
                result = problem.kernel.forward(tensors, problem.options)
            partial.add(rows, batch, result)
            blocks.append(result.saved)
            del tensors
            arrived.done(keys, batch)
    out, lse = partial.result()
    return out, lse, tuple(kept), tuple(blocks)


def _forward_stream(problem: RingProblem, own: tuple[torch.Tensor, ...], kept: list[torch.Tensor]) -> Stream:
    """Stream (key, value) with the problem's exchange; adds what backward needs besides ``own`` to ``kept``."""
    if problem.layout.ring_size == 1:
        yield own
        return
    exchange = EXCHANGES[problem.exchange]
    if len(problem.keep) != 1:
        stream = exchange(problem.channel, own, "kv", keep=bool(problem.keep))
        yield from _collect(stream, kept) if problem.keep else stream
        return
    streams = []
    for name, rows in zip(NAMES, own):
        stream = exchange(problem.channel, (rows,), f"kv.{name}", keep=name in problem.keep)
        streams.append(_collect(stream, kept) if name in problem.keep else stream)
    yield from paired(*streams)


def _collect(stream: Stream, kept: list[torch.Tensor]) -> Stream:
    """Pass a stream on and keep everything received (except the own shard, which is already kept)."""
    for step, rows in enumerate(stream):
        if step:
            kept += rows
        yield rows


def _backward_stream(problem: RingProblem, saved: tuple[torch.Tensor, ...]) -> Stream:
    """The forward pass's stream again, from kept tensors and by fetching the others again."""
    own, received = saved[: len(NAMES)], saved[len(NAMES) :]
    if problem.layout.ring_size == 1:
        yield own
        return
    exchange = EXCHANGES[problem.exchange]
    if len(problem.keep) == 1:
        yield from paired(
            *(
                ((shard,) for shard in (rows, *received))
                if name in problem.keep
                else exchange(problem.channel, (rows,), f"kv.{name}")
                for name, rows in zip(NAMES, own)
            )
        )
    elif problem.keep:
        yield from zip(saved[::2], saved[1::2], strict=True)
    else:
        yield from exchange(problem.channel, own, "kv")


class _SharedRows:
    """The whole attention's AttentionRows sliced to blocks' query rows. The last two slices are cached, since blocks
    share them: a zigzag rank uses all of its rows, and its later chunk.
    """

    def __init__(self, whole: AttentionRows) -> None:
        self._whole = whole
        self._cut: OrderedDict[tuple[Any, ...], AttentionRows] = OrderedDict()

    def of(self, rows: slice, batch: slice) -> AttentionRows:
        place = rows.start, rows.stop, batch.start, batch.stop
        if place not in self._cut:
            whole = self._whole
            self._cut[place] = AttentionRows(
                whole.grad_out[rows, batch], whole.out[rows, batch], whole.lse[rows, batch]
            )
            if len(self._cut) > 2:
                self._cut.popitem(last=False)
        return self._cut[place]


def ring_backward(
    problem: RingProblem,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    saved_blocks: tuple[Any, ...],
    expansion: Expansion | None = None,
    sums: Sums = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) in the accumulation dtype, or in the kernel's dtype if a single block computes them; with
    an expansion (dq, gradients of the two tensors that travel).

    Args:
        out, lse: those of the whole attention; lse is +inf if a row sees no key.
        saved, saved_blocks: what the forward pass returned for backward.
        expansion: that of the forward pass. sums: sums of its parameters' gradients, changed in place.

    The schedule starts again with the rank's own shard. The rank's own partial gradients are summed in place; those for
    other ranks are sent in the input's dtype, directly to the rank that sums them.
    """
    first = problem.steps[0]
    alone = problem.layout.ring_size == 1 and expansion is None
    tasks = problem.tasks(query, first) if alone else ()
    if len(tasks) == 1 and tasks[0].covers(query.shape[0], saved[0].shape[0]):
        mask, (key, value) = problem.mask_against(first), saved
        tensors = BlockTensors(tasks[0].block, query, key, value, mask)
        whole = AttentionRows(grad_out, out, lse)
        with named("block backward"):
            return problem.kernel.backward(tensors, whole, problem.options, saved_blocks[0])
    if problem.order == "sequence":
        grad_out = grad_out.contiguous()
    workspace, like = problem.groups.workspace, saved[: len(NAMES)]
    own = tuple(accumulator(workspace, f"dkv.own.{name}", rows.shape, query) for name, rows in zip(NAMES, like))
    returns, blocks = problem.gradient_return(own, like), iter(saved_blocks)
    dq, shared = RowSum(query, workspace), _SharedRows(AttentionRows(grad_out, out, lse))
    stream = _backward_stream(problem, saved)
    for step, source in zip(problem.steps, stream, strict=True):
        tasks, (target, accumulates) = problem.tasks(query, step), returns.target(step)
        arrived = problem.arrived(source, tasks, expansion, sums)
        partial = KVPartial(target, arrived.single, workspace, accumulates)
        mask = problem.mask_against(step)
        for batch, block in tasks:
            rows, keys = block.query_rows, block.key_rows
            tensors = BlockTensors(block, query[rows, batch], *arrived.read(keys, batch), mask)
            with named("block backward"):
                block_dq, *block_dkv = problem.kernel.backward(
                    tensors, shared.of(rows, batch), problem.options, next(blocks)
                )
            del tensors
            dq.add(rows, batch, block_dq)
            arrived.add(partial, keys, batch, block_dkv)
        returns.take(step, partial)
    dk, dv = returns.finish()
    return dq.result(), dk, dv
