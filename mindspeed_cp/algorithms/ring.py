"""The ring engine: one loop forward, one loop backward, for every mask, exchange, window and cache policy.

A schedule brings the keys and values of one rank after another; the plan says which blocks they make with this rank's
queries; the kernel computes each block; results are merged and gradients summed in the accumulation dtype. A ring of
one rank is the plain local attention that Ulysses needs.

Shapes: query (seq, batch, heads, dk), key (seq, batch, kv_heads, dk), value (seq, batch, kv_heads, dv), out
(seq, batch, heads, dv), lse (seq, batch, heads); seq is what this rank holds.
"""

from dataclasses import dataclass, field

import torch

from mindspeed_cp.algorithms.partial_sums import KVPartial, PartialAttention, RowSum, accumulator
from mindspeed_cp.blocks import Block, IntervalMask, needed_rows, plan_blocks
from mindspeed_cp.comm.exchange import EXCHANGES, GradientReturn, RingChannel, concatenated, pack_rows, paired
from mindspeed_cp.kernels.base import KernelOptions
from mindspeed_cp.layout import run_positions
from mindspeed_cp.softmax import merge_attention


@dataclass(frozen=True, eq=False)
class RingProblem:
    """Everything about one attention call that is not a tensor of the autograd graph.

    Args:
        runs: per ring rank, the runs of global positions that it holds.
        mask: IntervalMask; dense_mask: None or bool (1 or batch, S, S), True = masked out, on top of it.
        exchange: "ring", "direct" or "allgather".
        policy: None, "full" or "half": what forward keeps of the received keys and values.
    """

    groups: object
    runs: tuple
    mask: IntervalMask
    kernel: object
    options: KernelOptions
    exchange: str = "ring"
    policy: str | None = None
    overlap: bool = False
    dense_mask: torch.Tensor | None = None
    merge: object = merge_attention
    channel: RingChannel = field(init=False)

    def __post_init__(self):
        lengths = tuple(sum(stop - start for start, stop in runs) for runs in self.runs)
        object.__setattr__(self, "channel", RingChannel(self.groups, lengths, self._rows_needed, self.overlap))

    @property
    def rank(self):
        return self.groups.ring_rank

    def blocks(self, reader, source):
        """The blocks of ``reader``'s queries against ``source``'s keys; a dense mask makes one rectangle of them."""
        plan = plan_blocks(self.runs[reader], self.runs[source], self.mask, self.kernel.native_bands)
        if self.dense_mask is None or not plan:
            return plan
        lengths = self.channel.lengths
        return (Block((0, lengths[reader]), (0, lengths[source])),)

    def _rows_needed(self, reader, source):
        """Rows of ``source``'s shard to move to ``reader`` (and gradients back): the exact ones, or all where
        forwarded.
        """
        if self.exchange == "direct" and self.dense_mask is None:
            return needed_rows(self.runs[reader], self.runs[source], self.mask)
        return ((0, self.channel.lengths[source]),) if self.blocks(reader, source) else ()

    def mask_against(self, source):
        """The dense mask of this rank's queries against ``source``'s keys, intervals included; None without one."""
        if self.dense_mask is None:
            return None
        device = self.dense_mask.device
        queries, keys = (run_positions(self.runs[rank], device) for rank in (self.rank, source))
        hidden = self.dense_mask[:, queries][:, :, keys]
        return hidden | _interval_hidden(queries, keys, self.mask)


def _interval_hidden(queries, keys, mask):
    """Bool (queries, keys): hidden by the interval mask. Only beside a dense mask, which is that large already."""
    offset = keys - queries.unsqueeze(1)
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if mask.right is not None:
        hidden |= offset > mask.right
    if mask.left is not None:
        hidden |= offset < -mask.left
    if mask.cu_seqlens is not None:
        ends = torch.tensor(mask.cu_seqlens[1:], device=queries.device)
        hidden |= torch.bucketize(queries, ends, right=True).unsqueeze(1) != torch.bucketize(keys, ends, right=True)
    return hidden


@dataclass(frozen=True)
class RingSaved:
    """What forward hands to backward besides query, out and lse: tensors to save, and the kernels' dropout states."""

    tensors: tuple
    rngs: tuple


def ring_forward(problem, query, key, value):
    """Attention of this rank's queries over all keys.

    Returns:
        (out, lse, saved): out in the kernel's dtype when one block made it, else in the accumulation dtype, and then in
        reused memory unless that is the query's dtype.
    """
    partial = PartialAttention(problem, query, value)
    kept, rngs = [], []
    for source, source_key, source_value in _forward_stream(problem, key, value, kept):
        mask = problem.mask_against(source)
        for block in _local_blocks(problem, query, source):
            rows, keys = block.query_rows, block.key_rows
            block_out, block_lse, rng = problem.kernel.forward(
                query[rows], source_key[keys], source_value[keys], block, problem.options, mask
            )
            partial.add(rows, block_out, block_lse)
            rngs.append(rng)
    out, lse = partial.result()
    return out, lse, RingSaved(tuple(kept), tuple(rngs))


def _local_blocks(problem, query, source):
    """This rank's blocks against ``source``; none when uneven heads leave it without a head (kernels want at least
    one).
    """
    return problem.blocks(problem.rank, source) if query.numel() else ()


def _forward_stream(problem, key, value, kept):
    """Stream (source, key, value) by the problem's exchange; ``kept`` collects the tensors that backward starts from.

    Key and value travel packed in one message, except under the policy "half", which keeps the keys only.
    """
    if len(problem.runs) == 1:
        kept += [key, value]
        yield problem.rank, key, value
        return
    exchange = EXCHANGES[problem.exchange]
    if problem.policy == "half":
        own = (key.contiguous(), value.contiguous())
        kept += own
        keys = _collect(exchange(problem.channel, own[0], "kv", keep=True), kept)
        yield from paired(keys, exchange(problem.channel, own[1], "kv.value"))
        return
    own = pack_rows([key, value])
    kept.append(own)
    stream = exchange(problem.channel, own, "kv", keep=problem.policy == "full")
    yield from concatenated(_collect(stream, kept) if problem.policy == "full" else stream, key.shape[-1])


def _collect(stream, kept):
    """Pass a stream on and keep every received shard (not the own one, which is kept already)."""
    for step, (source, rows) in enumerate(stream):
        if step:
            kept.append(rows)
        yield source, rows


def _backward_stream(problem, kept, split):
    """The forward's stream again: from what was kept, and fetching again what was not."""
    if len(problem.runs) == 1:
        yield problem.rank, *kept
        return
    exchange, sources = EXCHANGES[problem.exchange], _sources(problem)
    if problem.policy == "full":
        yield from concatenated(zip(sources, kept, strict=True), split)
    elif problem.policy == "half":
        keys = zip(sources, (kept[0], *kept[2:]), strict=True)
        yield from paired(keys, exchange(problem.channel, kept[1], "kv.value"))
    else:
        yield from concatenated(exchange(problem.channel, kept[0], "kv"), split)


def _sources(problem):
    return [source for _, _, source in problem.channel.place.steps()]


def ring_backward(problem, grad_out, query, out, lse, saved):
    """Gradients (dq, dk, dv) in the accumulation dtype, or in the kernel's where one block makes them.

    Args:
        out, lse: of the whole attention; lse is +inf where a row sees no key.
        saved: RingSaved of the forward pass.

    The schedule runs again from the shard that the rank still holds, its own. Own partials are summed in place; those
    for other ranks leave in the input's dtype, straight to the rank that sums them.
    """
    if len(problem.runs) == 1 and len(blocks := _local_blocks(problem, query, 0)) == 1:
        return problem.kernel.backward(
            grad_out,
            query,
            *saved.tensors,
            out,
            lse,
            blocks[0],
            problem.options,
            saved.rngs[0],
            problem.mask_against(0),
        )
    split = query.shape[-1]
    wire = query.new_empty((0, *saved.tensors[0].shape[1:3], split + out.shape[-1]))
    own = accumulator(problem.groups.workspace, "dkv.own", (query.shape[0], *wire.shape[1:]), query)
    returns, rngs = GradientReturn(problem.channel, own, wire), iter(saved.rngs)
    dq = RowSum(query, problem.groups.workspace)
    stream = _backward_stream(problem, saved.tensors, split)
    for (j, t, source), (_, key, value) in zip(problem.channel.place.steps(), stream, strict=True):
        blocks = _local_blocks(problem, query, source)
        target = returns.begin(j) if t == 0 else returns.wire(t, source)
        partial = KVPartial(target, len(blocks), problem.groups.workspace, t == 0)
        mask = problem.mask_against(source)
        for block in blocks:
            rows, keys = block.query_rows, block.key_rows
            block_dq, *block_dkv = problem.kernel.backward(
                grad_out[rows],
                query[rows],
                key[keys],
                value[keys],
                out[rows],
                lse[rows],
                block,
                problem.options,
                next(rngs),
                mask,
            )
            dq.add(rows, block_dq)
            partial.add(keys, block_dkv, split)
        partial.store()
        if t > 0:
            returns.send(j, t, source, target)
        if t + 1 == problem.channel.place.window:
            returns.end(j)
    own = returns.finish()
    return dq.result(), own[..., :split], own[..., split:]
