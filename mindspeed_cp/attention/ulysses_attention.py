"""Ulysses around any local attention module, aligned and unaligned: ``UlyssesContextAttention`` and its calculators.

The exchange works on sequence-first tensors; other orders are permuted views of them::

    outside  (.., gather_idx = seq_local, .., scatter_idx = heads, ..)     exchange  (seq, batch, heads, dim)

A tensor whose last dimension is scattered has heads and head_dim merged; it is split into equal parts.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.attention.exchanged import Exchanged, exchanging
from mindspeed_cp.attention.gather_size import (
    DefaultGatherSizeCalculator,
    DynamicGatherSizeCalculator,
    GatherSizeCalculator,
    calculator_named,
    check_lengths,
    check_single,
)
from mindspeed_cp.attention.head_groups import head_shares
from mindspeed_cp.comm.head_exchange import HeadExchange
from mindspeed_cp.comm.link import Link, link_of, ranks_of
from mindspeed_cp.comm.sequence_exchange import Part, SequenceExchange
from mindspeed_cp.kernels.base import MemoryOrder
from mindspeed_cp.sequence.runs import Runs, end_to_end, split_sizes

Shares = tuple[slice | list[int], ...]  # heads per rank

__all__ = [
    "DefaultGatherSizeCalculator",
    "DynamicGatherSizeCalculator",
    "GatherSizeCalculator",
    "UlyssesContextAttention",
]


class UlyssesContextAttention(torch.nn.Module):
    """Attention over a sequence split over a group, by a local attention over the whole sequence for some heads.

    Args:
        local_attention: called as local_attention(query, key, value, *args, **kwargs) with this rank's heads of the
            whole sequence; returns (seq, batch, heads, dim), or merged (seq, batch, heads * dim). If its ``forward``
            has the attribute ``exchanges_context_parallel``, as Megatron's core attention has with the adaptor, it gets
            this rank's tokens unchanged. Inside a wrapper it gets the whole sequence and detects this
            (``exchanged.exchange_around``), so that nothing is exchanged twice.
        sequence_process_group: the ranks that share the sequence; None for the default group.
        scatter_idx, gather_idx: dimension of the heads, and of the sequence.
        gather_size_calculator: a GatherSizeCalculator, or its name: "default", "dynamic", "package.module:Class".
    """

    def __init__(
        self,
        local_attention: Callable[..., torch.Tensor],
        sequence_process_group: dist.ProcessGroup | None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        gather_size_calculator: GatherSizeCalculator | str = DefaultGatherSizeCalculator(),  # noqa: B008  stateless, published
    ) -> None:
        super().__init__()
        self.local_attn = local_attention
        self.spg, self.scatter_idx, self.gather_idx = sequence_process_group, scatter_idx, gather_idx
        if isinstance(gather_size_calculator, str):
            gather_size_calculator = calculator_named(gather_size_calculator)
        self.gather_size_calculator: GatherSizeCalculator = gather_size_calculator
        self._checked: set[tuple[int, int]] = set()  # (length, gather size) on which all ranks have agreed

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of this rank's tokens; every rank of the group calls it.

        Args:
            query, key, value: with the default indices (seq_local, batch, heads or kv_heads, dim); heads may be uneven,
                and heads % kv_heads == 0. Three dimensions are (seq_local, heads, dim) with scatter_idx 1, or
                (seq_local, batch, heads * dim) with scatter_idx 2.
            args, kwargs: passed to the calculator and to the local attention; keyword arguments that the local
                attention does not accept are passed only to a custom calculator.

        Returns:
            The local attention's output for this rank's tokens and all heads, with the same number of dimensions.

        Raises:
            ValueError: lengths or heads cannot be split like this. With gloo every rank raises it. With NCCL and HCCL
                a length is checked only the first time, so if a single rank returns to an old one, they time out.
        """
        gather_size = self.gather_size_calculator.calculate(*args, **kwargs)
        kwargs = self._local_kwargs(kwargs)
        if _exchanges_itself(self.local_attn):
            return self.local_attn(query, key, value, *args, **kwargs)
        if len(ranks_of(self.spg)) == 1:
            check_single(query.size(self.gather_idx), gather_size)
            return self.local_attn(query, key, value, *args, **kwargs)
        axes = _Axes.of(query, self.scatter_idx, self.gather_idx)
        exchange = self._exchange(query, gather_size, "sequence" if axes.sequence_first else None)
        parts, out_shares = _parts(axes, query, key, value, exchange.size)
        tensors = (axes.to_exchange(tensor, exchange.size) for tensor in (query, key, value))
        received = HeadExchange(exchange, parts, "d").to_sequence(*tensors)
        with exchanging(Exchanged(exchange.link.global_ranks, exchange.rank)):
            # Contiguous, because many attention modules call view() on their inputs.
            out = self.local_attn(*(axes.from_exchange(tensor).contiguous() for tensor in received), *args, **kwargs)
        split, merged = axes.split_heads(out, query.dim(), parts[0].count(exchange.rank))
        out = axes.to_exchange(split, 1)
        part = Part("out", parts[0].num_heads, out.shape[-1], out_shares)
        out = axes.from_exchange(HeadExchange(exchange, [part], "d").to_heads(out)[0])
        return out.flatten(-2) if merged else out

    def _local_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments that the local attention accepts.

        With the default calculator, which uses none, unknown names are not removed, so that the local attention rejects
        them.
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

    def _exchange(self, query: torch.Tensor, gather_size: int | None, unpack: MemoryOrder | None) -> SequenceExchange:
        """The SequenceExchange of one call.

        The ranks' lengths are derived from this rank's, and all ranks must agree: a wrong length is an error on all of
        them, not a hang. If messages can carry a stamp, lengths are compared with the messages, at no cost. Otherwise,
        on devices, they are gathered once per length; lengths that a calculator wants to be summed are gathered every
        time, because another rank's length may change while this rank's does not.
        """
        link, length = link_of(self.spg), query.size(self.gather_idx)
        stamp = (length, -1 if gather_size is None else int(gather_size))
        check: Callable[[list[tuple[int, int]]], Any] = partial(check_lengths, self.gather_size_calculator)
        if gather_size is None and self.gather_size_calculator.sums_local_lengths:
            lengths = check(_stamps_of_all(link, stamp, query.device))
            return SequenceExchange(link, _in_rank_order(lengths), unpack=unpack)
        lengths = [length] * link.size if gather_size is None else split_sizes(int(gather_size), link.size)
        if link.tells(query.device):
            return SequenceExchange(link, _in_rank_order(lengths), unpack=unpack, stamp=stamp, check=check)
        if stamp not in self._checked:
            check(_stamps_of_all(link, stamp, query.device))
            self._checked.add(stamp)
        return SequenceExchange(link, _in_rank_order(lengths), unpack=unpack)


def _exchanges_itself(local_attention: Any) -> bool:
    """Whether this is Megatron's core attention, patched by the adaptor to attend over the whole sequence."""
    marked = getattr(getattr(type(local_attention), "forward", None), "exchanges_context_parallel", False)
    return bool(marked) and local_attention.config.context_parallel_size > 1


def _in_rank_order(lengths: list[int]) -> tuple[Runs, ...]:
    return tuple((run,) for run in end_to_end(lengths))


def _stamps_of_all(link: Link, stamp: tuple[int, int], device: torch.device) -> list[tuple[int, int]]:
    rows = link.gather(torch.tensor(stamp, device=device), [2] * link.size, "lengths").wait()
    return [(int(row[0]), int(row[1])) for row in rows]


@dataclass(frozen=True)
class _Axes:
    """The positions of heads, sequence, batch and head_dim in the caller's tensors.

    Args:
        order: the caller's dimensions in the order (seq, batch, heads, dim); None for missing ones.
        scatter: the caller's dimension of heads.
    """

    order: tuple[int, int | None, int, int | None]
    scatter: int

    @classmethod
    def of(cls, query: torch.Tensor, scatter_idx: int, gather_idx: int) -> "_Axes":
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
    def sequence_first(self) -> bool:
        """Whether the caller's memory order is that of the exchange."""
        order = [dim for dim in self.order if dim is not None]
        return order == sorted(order)

    @property
    def merged(self) -> bool:
        return self.order[3] is None

    def to_exchange(self, tensor: torch.Tensor, pieces: int) -> torch.Tensor:
        """A view (seq, batch, heads, dim) of the caller's tensor; a merged dimension is split into ``pieces`` heads."""
        view = tensor.permute([dim for dim in self.order if dim is not None])
        if self.merged:
            cut: torch.Tensor = view.unflatten(2, (pieces, -1))
            return cut
        return view.unsqueeze(1) if self.order[1] is None else view

    def from_exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse view."""
        tensor = tensor.flatten(2) if self.merged else tensor.squeeze(1) if self.order[1] is None else tensor
        order = [dim for dim in self.order if dim is not None]
        return tensor.permute([order.index(dim) for dim in range(len(order))])

    def split_heads(self, out: torch.Tensor, num_dims: int, num_heads: int) -> tuple[torch.Tensor, bool]:
        """(out with separate heads and head_dim as in the query, whether the local attention had merged them)."""
        if out.dim() == num_dims:
            return out, False
        if out.dim() != num_dims - 1 or self.scatter != num_dims - 2:
            raise ValueError(
                f"the local attention returned {tuple(out.shape)}; it must return {num_dims} dimensions "
                "like the query" + (", or merge heads and head_dim." if self.scatter == num_dims - 2 else ".")
            )
        return out.unflatten(-1, (num_heads, -1)), True


def _parts(
    axes: _Axes, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, world_size: int
) -> tuple[tuple[Part, ...], Shares]:
    """(Part of query, key and value, shares of the output); KV heads are replicated only as far as needed.

    Raises:
        ValueError: the heads cannot be split over the ranks.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        length, query_length = tensor.size(axes.order[0]), query.size(axes.order[0])
        if length != query_length:
            raise ValueError(
                f"{name} has {length} tokens on this rank and query {query_length}: cross attention cannot go through "
                "UlyssesContextAttention, whose query, key and value are one sequence split over the group; call the "
                "local attention itself with the whole key and value on every rank."
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}; convert them to one dtype.")
    heads, kv_heads, value_heads = (tensor.size(axes.scatter) for tensor in tensors.values())
    if axes.merged:
        for name, tensor in tensors.items():
            if tensor.size(axes.scatter) % world_size:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} has heads and head_dim merged, and "
                    f"{tensor.size(axes.scatter)} cannot be cut into {world_size} equal parts; pass (seq, "
                    "batch, heads, head_dim), which takes uneven heads."
                )
        queries = tuple(slice(rank, rank + 1) for rank in range(world_size))
        keys: Shares = queries
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
