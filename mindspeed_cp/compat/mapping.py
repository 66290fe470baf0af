"""Differentiable collectives for any tensor: all-to-all, split and gather along any dimension, even or uneven.

Sizes follow one rule everywhere: a dimension is cut into sizes that differ by at most one, the first ranks get the
remainder. The backward pass of each function is the inverse mapping.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.link import link_of
from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.meter import record
from mindspeed_cp.sequence.layout import split_sizes as _split_sizes

__all__ = [
    "_gather",
    "_split",
    "all_to_all",
    "cal_split_sizes",
    "gather_forward_split_backward",
    "split_forward_gather_backward",
]

GRAD_SCALES = ("up", "down", None)


def cal_split_sizes(dim_size, world_size):
    """The sizes into which ``dim_size`` is cut for ``world_size`` ranks, the remainder on the first."""
    return _split_sizes(dim_size, world_size)


def all_to_all(input_, process_group, scatter_dim=2, gather_dim=1, gather_size=None):
    """Cut ``scatter_dim`` over the ranks and join ``gather_dim``: (.., S, .., g, ..) -> (.., s, .., G, ..).

    Args:
        input_: 3-D or 4-D tensor; the whole ``scatter_dim``, and this rank's part of ``gather_dim``.
        process_group: every rank of it calls this; None is the default group.
        scatter_dim, gather_dim: two different dimensions, negative ones count from the end.
        gather_size: length of ``gather_dim`` over all ranks; None when every rank holds equally much.

    Returns:
        a contiguous tensor; ``input_`` itself in a group of one rank.

    Raises:
        ValueError: the dimensions do not fit the tensor, or this rank's part is not its share of ``gather_size``.
    """
    arguments = _checked_dimensions(input_, process_group, scatter_dim, gather_dim, gather_size)
    return input_ if dist.get_world_size(process_group) == 1 else _AllToAll.apply(input_, *arguments)


def _checked_dimensions(input_, process_group, scatter_dim, gather_dim, gather_size):
    """(process_group, scatter_dim, gather_dim, gather_size) with no negative dimension and no None."""
    if input_.dim() not in (3, 4):
        raise ValueError(
            f"all_to_all takes tensors of 3 or 4 dimensions, not {tuple(input_.shape)}; view it as one of those."
        )
    scatter_dim, gather_dim = (
        _dimension(dim, input_.dim(), name) for dim, name in ((scatter_dim, "scatter_dim"), (gather_dim, "gather_dim"))
    )
    if scatter_dim == gather_dim:
        raise ValueError(
            f"scatter_dim and gather_dim are both {scatter_dim} and must differ; name the dimension to "
            "cut and the dimension to join."
        )
    world_size = dist.get_world_size(process_group)
    if gather_size is None:
        gather_size = input_.size(gather_dim) * world_size
    share = _split_sizes(gather_size, world_size)[dist.get_rank(process_group)]
    if share != input_.size(gather_dim):
        raise ValueError(
            f"gather_size {gather_size} gives rank {dist.get_rank(process_group)} of {world_size} a "
            f"length of {share} on dimension {gather_dim}, and its tensor has {input_.size(gather_dim)}; "
            f"split with cal_split_sizes({gather_size}, {world_size}), or pass the sum of all lengths."
        )
    return process_group, scatter_dim, gather_dim, gather_size


def start_all_to_all(input_, process_group, scatter_dim=2, gather_dim=1, gather_size=None):
    """``all_to_all`` that returns at once: a ``PendingTensor``, whose ``wait`` gives the result.

    What is computed in between overlaps the exchange. Backward does the same the other way round: the gradient departs
    where ``wait`` was, and is awaited only where ``input_``'s own gradient is needed. So with separate projections ::

        query, key, value = (start_all_to_all(project(hidden), group) for project in (to_query, to_key, to_value))
        out = attention(query.wait(), key.wait(), value.wait())

    each exchange overlaps the next projection, forward, and the projections' own backward passes. All ranks start in
    one order and wait in one order; ``input_`` must not be changed in place before ``wait``.
    """
    return PendingTensor(input_, *_checked_dimensions(input_, process_group, scatter_dim, gather_dim, gather_size))


class PendingTensor:
    """A tensor under way, made by ``start_all_to_all``."""

    def __init__(self, input_, group, scatter_dim, gather_dim, gather_size):
        self._result, self._flight = None, None
        if dist.get_world_size(group) == 1:
            self._result = input_
        else:
            self._flight = _Flight(group, scatter_dim, gather_dim, gather_size, input_.size(scatter_dim))
            self._token = _Depart.apply(input_, self._flight)

    def wait(self):
        """The tensor; the same one each time."""
        if self._result is None:
            self._result = _Arrive.apply(self._token, self._flight)
        return self._result


def split_forward_gather_backward(input_, process_group, dim, split_sizes=None, grad_scale="down"):
    """Keep this rank's part of ``dim``; backward gathers the gradients of all parts.

    Args:
        input_: the same tensor on every rank.
        split_sizes: length of every rank's part, None for the usual rule.
        grad_scale: "up" or "down" multiplies or divides the gradient by the number of ranks, None leaves it.
    """
    dim, world_size = _dimension(dim, input_.dim(), "dim"), dist.get_world_size(process_group)
    sizes = _checked_sizes(split_sizes, world_size, "split_sizes") or _split_sizes(input_.size(dim), world_size)
    if sum(sizes) != input_.size(dim):
        raise ValueError(
            f"split_sizes {sizes} must sum to {input_.size(dim)}, the length of dimension {dim}; "
            "leave them out for an even split."
        )
    _check_grad_scale(grad_scale)
    return input_ if world_size == 1 else _Split.apply(input_, process_group, dim, tuple(sizes), grad_scale)


def gather_forward_split_backward(input_, process_group, dim, gather_sizes=None, grad_scale="up"):
    """Join every rank's part along ``dim``; backward keeps this rank's part of the gradient.

    Args:
        input_: this rank's part.
        gather_sizes: length of every rank's part, None when all are as long as this one.
        grad_scale: "up" or "down" multiplies or divides the gradient by the number of ranks, None leaves it.
    """
    dim, world_size = _dimension(dim, input_.dim(), "dim"), dist.get_world_size(process_group)
    sizes = _checked_sizes(gather_sizes, world_size, "gather_sizes") or [input_.size(dim)] * world_size
    rank = dist.get_rank(process_group)
    if sizes[rank] != input_.size(dim):
        raise ValueError(
            f"gather_sizes {sizes} give rank {rank} a length of {sizes[rank]}, and its tensor has "
            f"{input_.size(dim)} on dimension {dim}; pass the length of every rank's part in rank order."
        )
    _check_grad_scale(grad_scale)
    return input_ if world_size == 1 else _Gather.apply(input_, process_group, dim, tuple(sizes), grad_scale)


@torch.no_grad()
def _split(input_, pg, dim=-1, split_sizes=None):
    """``split_forward_gather_backward`` under MindSpeed's name for the part without gradients."""
    return split_forward_gather_backward(input_, pg, dim, split_sizes, None)


@torch.no_grad()
def _gather(input_, pg, dim=-1, gather_sizes=None):
    """``gather_forward_split_backward`` under MindSpeed's name for the part without gradients."""
    return gather_forward_split_backward(input_, pg, dim, gather_sizes, None)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_, group, scatter_dim, gather_dim, gather_size):
        ctx.inverse = group, gather_dim, scatter_dim, input_.size(scatter_dim)
        return _exchange(input_, group, scatter_dim, gather_dim, gather_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return _exchange(grad_output, *ctx.inverse), None, None, None, None


class _Flight:
    """What the two ends of a pending all-to-all share: the exchange that is under way."""

    def __init__(self, group, scatter_dim, gather_dim, gather_size, scatter_size):
        self.forward = group, scatter_dim, gather_dim, gather_size
        self.backward = group, gather_dim, scatter_dim, scatter_size
        self._pending = None

    def depart(self, tensor, route):
        self._pending = _start_exchange(tensor, *route)

    def arrive(self):
        """Wait for the result; the buffers of the exchange are given up with it."""
        pending, self._pending = self._pending, None
        return pending.wait()


class _Depart(torch.autograd.Function):
    """Starts an exchange; an empty token ties it to ``_Arrive``, so that autograd calls them in turn."""

    @staticmethod
    def forward(ctx, input_, flight):
        ctx.flight = flight
        flight.depart(input_, flight.forward)
        return input_.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.flight.arrive(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, flight):
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        ctx.flight.depart(grad_output, ctx.flight.backward)
        return grad_output.new_empty(0), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_, group, dim, sizes, grad_scale):
        ctx.group, ctx.dim, ctx.sizes, ctx.grad_scale = group, dim, sizes, grad_scale
        return _own_part(input_, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad = _scaled(grad_output, ctx.grad_scale, len(ctx.sizes))
        return _gathered(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_, group, dim, sizes, grad_scale):
        ctx.group, ctx.dim, ctx.sizes, ctx.grad_scale = group, dim, sizes, grad_scale
        return _gathered(input_, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad = _own_part(grad_output, ctx.group, ctx.dim, ctx.sizes)
        return _scaled(grad, ctx.grad_scale, len(ctx.sizes)), None, None, None, None


def _exchange(tensor, group, scatter_dim, gather_dim, gather_size):
    return _start_exchange(tensor, group, scatter_dim, gather_dim, gather_size).wait()


def _start_exchange(tensor, group, scatter_dim, gather_dim, gather_size):
    """Pending of the result of one all-to-all; a side whose dimension is the first is sent, or received, in place."""
    link = link_of(group)
    sizes = _split_sizes(tensor.size(scatter_dim), link.size)
    pieces = tensor.split(sizes, dim=scatter_dim)
    shape = list(tensor.shape)
    shape[scatter_dim], shape[gather_dim] = sizes[link.rank], gather_size
    result = tensor.new_empty(shape)
    joined = result.split(_split_sizes(gather_size, link.size), dim=gather_dim)
    leaving, arriving = ([Message(((part,),), tensor.dtype) for part in parts] for parts in (pieces, joined))
    pending = link.all_to_all(leaving, arriving, "all_to_all")
    record({"all_to_all": (tensor.numel() - pieces[link.rank].numel()) * tensor.element_size()})
    return pending.then(lambda _: result)


def _own_part(tensor, group, dim, sizes):
    rank = dist.get_rank(group)
    return tensor.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()


def _gathered(tensor, group, dim, sizes):
    """All parts joined along ``dim``."""
    shards = link_of(group).gather(tensor.movedim(dim, 0).contiguous(), sizes, "gather").wait()
    return torch.cat(shards).movedim(0, dim).contiguous()


def _scaled(grad, grad_scale, world_size):
    if grad_scale is None:
        return grad
    return grad * world_size if grad_scale == "up" else grad / world_size


def _dimension(dim, num_dims, name):
    if not -num_dims <= dim < num_dims:
        raise ValueError(
            f"{name} {dim} does not exist in a tensor of {num_dims} dimensions; choose 0 to {num_dims - 1}."
        )
    return dim % num_dims


def _checked_sizes(sizes, world_size, name):
    if sizes is not None and len(sizes) != world_size:
        raise ValueError(f"{name} {list(sizes)} must hold one length for each of the {world_size} ranks of the group.")
    return list(sizes) if sizes is not None else None


def _check_grad_scale(grad_scale):
    if grad_scale not in GRAD_SCALES:
        raise ValueError(f"grad_scale {grad_scale!r} is not known; choose 'up', 'down' or None.")
