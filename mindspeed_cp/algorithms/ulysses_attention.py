"""Ulysses around any local attention module, aligned and unaligned: ``UlyssesContextAttention`` and its calculators.

The exchange is written for sequence-first tensors; other orders are permuted views of them::

    outside  (.., gather_idx = seq_local, .., scatter_idx = heads, ..)     exchange  (seq, batch, heads, dim)

A tensor whose last dimension is scattered has heads and head_dim merged; it is cut into equal parts.
"""

import inspect
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mindspeed_cp.algorithms.ulysses import head_shares
from mindspeed_cp.comm.all_to_all import SequenceExchange
from mindspeed_cp.comm.host_memory import HostMemory
from mindspeed_cp.comm.messages import Part
from mindspeed_cp.comm.transport import all_gather
from mindspeed_cp.comm.workspace import Workspace
from mindspeed_cp.layout import split_sizes

__all__ = [
    "DefaultGatherSizeCalculator",
    "DynamicGatherSizeCalculator",
    "GatherSizeCalculator",
    "UlyssesContextAttention",
]


# Process group -> (Workspace, HostMemory or None): all modules of a group share them, as layers do, and copies of a
# module too.
_memories: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[Workspace, HostMemory | None]] = (
    weakref.WeakKeyDictionary()
)


def _memory_of(group):
    """The buffers of a group; made in the first call of one of its modules, which every rank makes."""
    group = dist.group.WORLD if group is None else group
    if group not in _memories:
        _memories[group] = Workspace(), HostMemory.connect(group)
    return _memories[group]


class GatherSizeCalculator(ABC):
    """Says how long the sequence is after the all-to-all; write a subclass for lengths that only your model knows.

    Attributes:
        sums_local_lengths: True makes a None of ``calculate`` mean the sum of the lengths that the ranks hold.
    """

    sums_local_lengths = False

    @abstractmethod
    def calculate(self, *args, **kwargs):
        """The length of the whole sequence, or None when every rank holds equally much of it.

        Args:
            args, kwargs: those of the attention call after query, key and value.
        """


class DefaultGatherSizeCalculator(GatherSizeCalculator):
    """Aligned Ulysses: every rank holds the same number of tokens."""

    def calculate(self, *args, **kwargs):
        return None


class DynamicGatherSizeCalculator(GatherSizeCalculator):
    """The length of the attention mask, or what the ranks hold together when there is no mask."""

    sums_local_lengths = True

    def calculate(self, *args, **kwargs):
        """Last dimension of the mask: the first positional argument, or ``attention_mask`` or ``attn_mask``."""
        candidates = [*args[:1], kwargs.get("attention_mask"), kwargs.get("attn_mask")]
        return next((mask.shape[-1] for mask in candidates if isinstance(mask, torch.Tensor)), None)


class UlyssesContextAttention(torch.nn.Module):
    """Attention over a sequence split over a group, by a local attention that sees all of it for some heads.

    Args:
        local_attention: called as local_attention(query, key, value, *args, **kwargs) with this rank's heads of the
            whole sequence; returns them as (seq, batch, heads, dim), or merged as (seq, batch, heads * dim).
        sequence_process_group: the ranks that share the sequence; None is the default group.
        scatter_idx, gather_idx: dimension of the heads, and of the sequence.
        gather_size_calculator: a GatherSizeCalculator.
    """

    def __init__(
        self,
        local_attention,
        sequence_process_group,
        scatter_idx=2,
        gather_idx=0,
        gather_size_calculator=DefaultGatherSizeCalculator(),  # noqa: B008  stateless, and the signature is published
    ):
        super().__init__()
        self.local_attn = local_attention
        self.spg, self.scatter_idx, self.gather_idx = sequence_process_group, scatter_idx, gather_idx
        self.gather_size_calculator = gather_size_calculator

    def forward(self, query, key, value, *args, **kwargs):
        """Attention of this rank's tokens; every rank of the group calls it.

        Args:
            query, key, value: with the default indices (seq_local, batch, heads or kv_heads, dim); heads may be uneven,
                and heads % kv_heads == 0. Three dimensions are (seq_local, heads, dim) with scatter_idx 1, or
                (seq_local, batch, heads * dim) with scatter_idx 2.
            args, kwargs: go to the calculator and to the local attention; keyword arguments that the local attention
                does not take stay with a calculator of your own.

        Returns:
            The local attention's output for this rank's tokens and all heads, with as many dimensions as it had.

        Raises:
            ValueError: lengths or heads cannot be split like this; every rank raises it.
        """
        gather_size = self.gather_size_calculator.calculate(*args, **kwargs)
        kwargs = self._local_kwargs(kwargs)
        if dist.get_world_size(self.spg) == 1:
            _check_single(query.size(self.gather_idx), gather_size)
            return self.local_attn(query, key, value, *args, **kwargs)
        axes = _Axes.of(query, self.scatter_idx, self.gather_idx)
        lengths = self._lengths(query, gather_size)
        workspace, host = _memory_of(self.spg)
        exchange = SequenceExchange(
            self.spg,
            dist.get_rank(self.spg),
            lengths,
            workspace,
            host=host,
            unpack="sequence" if axes.sequence_first else None,
        )
        parts, out_shares = _parts(axes, query, key, value, exchange.size)
        tensors = (axes.to_exchange(tensor, exchange.size) for tensor in (query, key, value))
        received = _GatherSequence.apply(exchange, parts, *tensors)
        # Contiguous, because many attention modules call view() on what they get.
        out = self.local_attn(*(axes.from_exchange(tensor).contiguous() for tensor in received), *args, **kwargs)
        split, merged = axes.split_heads(out, query.dim(), parts[0].count(exchange.rank))
        out = axes.to_exchange(split, 1)
        part = Part("out", parts[0].num_heads, out.shape[-1], out_shares)
        out = axes.from_exchange(_GatherHeads.apply(exchange, part, out))
        return out.flatten(-2) if merged else out

    def _local_kwargs(self, kwargs):
        """Without what the local attention does not take.

        The default calculator reads nothing: there an unknown name is a mistake, and the local attention's to refuse.
        """
        if isinstance(self.gather_size_calculator, DefaultGatherSizeCalculator):
            return kwargs
        function = self.local_attn.forward if isinstance(self.local_attn, torch.nn.Module) else self.local_attn
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # some built-in functions have no signature
            return kwargs
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return kwargs
        return {name: argument for name, argument in kwargs.items() if name in parameters}

    def _lengths(self, query, gather_size):
        """Tokens of every rank, the same on all ranks: they tell each other, so that no wrong length becomes a hang."""
        mine = [query.size(self.gather_idx), -1 if gather_size is None else int(gather_size)]
        send = torch.tensor(mine, device=query.device)
        table = send.new_empty(2 * dist.get_world_size(self.spg))
        all_gather(table, send, self.spg, "lengths").wait()
        lengths, sizes = table.view(-1, 2).t().tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"the gather size calculator gives the ranks different lengths {sizes} (-1 is None); it "
                "must give all ranks the length of the whole sequence."
            )
        if gather_size is None:
            _check_aligned(lengths, self.gather_size_calculator)
        elif lengths != split_sizes(gather_size, len(lengths)):
            raise ValueError(
                f"gather size {gather_size} gives the ranks {split_sizes(gather_size, len(lengths))} "
                f"tokens, and they hold {lengths}; split with cal_split_sizes({gather_size}, "
                f"{len(lengths)}), or let the calculator return {sum(lengths)}."
            )
        return tuple(lengths)


def _check_single(length, gather_size):
    if gather_size is not None and gather_size != length:
        raise ValueError(
            f"gather size {gather_size} must be the sequence length {length} in a group of one rank; pass "
            "the whole sequence."
        )


def _check_aligned(lengths, calculator):
    """Lengths without a gather size: equal for aligned Ulysses, the usual split where they are summed."""
    if calculator.sums_local_lengths:
        if lengths != split_sizes(sum(lengths), len(lengths)):
            raise ValueError(
                f"the ranks hold {lengths} tokens, and a sequence of {sum(lengths)} must be split as "
                f"{split_sizes(sum(lengths), len(lengths))}; split with cal_split_sizes({sum(lengths)}, "
                f"{len(lengths)})."
            )
    elif len(set(lengths)) > 1:
        raise ValueError(
            f"aligned Ulysses needs the same number of tokens on every rank, and they hold {lengths}; "
            "pass gather_size_calculator=DynamicGatherSizeCalculator() (--gather-size-calculator "
            f"dynamic), which takes any length, or a sequence length that {len(lengths)} divides."
        )


@dataclass(frozen=True)
class _Axes:
    """Where heads, sequence, batch and head_dim are in the caller's tensors.

    Args:
        order: the caller's dimensions in the order (seq, batch, heads, dim); None where the caller has none.
        scatter: the caller's dimension of heads.
    """

    order: tuple
    scatter: int

    @classmethod
    def of(cls, query, scatter_idx, gather_idx):
        num_dims = query.dim()
        scatter, gather = scatter_idx % num_dims, gather_idx % num_dims
        if num_dims not in (3, 4) or scatter == gather:
            raise ValueError(
                f"query has shape {tuple(query.shape)}, scatter_idx is {scatter_idx} and gather_idx "
                f"{gather_idx}; pass tensors of 3 or 4 dimensions and two different indices."
            )
        others = [dim for dim in range(num_dims) if dim not in (scatter, gather)]
        if num_dims == 4:
            return cls((gather, others[0], scatter, others[1]), scatter)
        if others[0] > scatter:  # (seq, heads, dim)
            return cls((gather, None, scatter, others[0]), scatter)
        return cls((gather, others[0], scatter, None), scatter)

    @property
    def sequence_first(self):
        """Whether the caller's order in memory is the exchange's."""
        order = [dim for dim in self.order if dim is not None]
        return order == sorted(order)

    @property
    def merged(self):
        return self.order[3] is None

    def to_exchange(self, tensor, pieces):
        """A view (seq, batch, heads, dim) of the caller's tensor; a merged dimension is cut into ``pieces`` heads."""
        view = tensor.permute([dim for dim in self.order if dim is not None])
        if self.merged:
            return view.unflatten(2, (pieces, -1))
        return view.unsqueeze(1) if self.order[1] is None else view

    def from_exchange(self, tensor):
        """The inverse view."""
        tensor = tensor.flatten(2) if self.merged else tensor.squeeze(1) if self.order[1] is None else tensor
        order = [dim for dim in self.order if dim is not None]
        return tensor.permute([order.index(dim) for dim in range(len(order))])

    def split_heads(self, out, num_dims, num_heads):
        """(out with heads and head_dim apart as in the query, whether the local attention had merged them)."""
        if out.dim() == num_dims:
            return out, False
        if out.dim() != num_dims - 1 or self.scatter != num_dims - 2:
            raise ValueError(
                f"the local attention returned {tuple(out.shape)}; it must return {num_dims} dimensions "
                "like the query" + (", or merge heads and head_dim." if self.scatter == num_dims - 2 else ".")
            )
        return out.unflatten(-1, (num_heads, -1)), True


def _parts(axes, query, key, value, world_size):
    """(Part of query, key and value, shares of the output); KV heads are replicated only as far as needed.

    Raises:
        ValueError: the heads cannot be split over the ranks.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dtype != query.dtype or tensor.size(axes.order[0]) != query.size(axes.order[0]):
            raise ValueError(
                f"{name} is {tensor.dtype} with {tensor.size(axes.order[0])} tokens, the query "
                f"{query.dtype} with {query.size(axes.order[0])}; they must have the same of both."
            )
    heads, kv_heads, value_heads = (tensor.size(axes.scatter) for tensor in tensors.values())
    if axes.merged:
        for name, tensor in tensors.items():
            if tensor.size(axes.scatter) % world_size:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} has heads and head_dim merged, and "
                    f"{tensor.size(axes.scatter)} cannot be cut into {world_size} equal parts; pass (seq, "
                    "batch, heads, head_dim), which takes uneven heads."
                )
        queries = keys = tuple(slice(rank, rank + 1) for rank in range(world_size))
        heads = kv_heads = world_size
    else:
        if kv_heads != value_heads or kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"query has {heads} heads, key {kv_heads} and value {value_heads}; the latter two must be "
                "equal and divide the first."
            )
        if heads < world_size:
            raise ValueError(
                f"{heads} heads cannot give each of {world_size} ranks one; use a group of at most "
                f"{heads} ranks, or --context-parallel-algo megatron_cp_algo, which splits no heads."
            )
        queries, keys = head_shares(heads, kv_heads, world_size)
    rows = (("q", heads, query, queries), ("kv", kv_heads, key, keys), ("kv", kv_heads, value, keys))
    return tuple(
        Part(purpose, count, axes.to_exchange(tensor, world_size).shape[-1], shares)
        for purpose, count, tensor, shares in rows
    ), queries


class _GatherSequence(torch.autograd.Function):
    """Query, key and value: (seq_local, batch, heads, dim) -> (seq, batch, heads_local, dim), in one message."""

    @staticmethod
    def forward(ctx, exchange, parts, *tensors):
        ctx.exchange, ctx.parts = exchange, [replace(part, purpose=f"d{part.purpose}") for part in parts]
        return tuple(exchange.scatter_heads_gather_sequence(parts, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, None, *ctx.exchange.scatter_sequence_gather_heads(ctx.parts, grads, grads[0].dtype)


class _GatherHeads(torch.autograd.Function):
    """The output: (seq, batch, heads_local, dim) -> (seq_local, batch, heads, dim)."""

    @staticmethod
    def forward(ctx, exchange, part, out):
        ctx.exchange, ctx.part = exchange, replace(part, purpose=f"d{part.purpose}")
        return exchange.scatter_sequence_gather_heads([part], [out], out.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return None, None, ctx.exchange.scatter_heads_gather_sequence([ctx.part], [grad_out])[0]
