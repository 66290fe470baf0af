"""Differentiable collectives for any tensor: all-to-all, split and gather along any dimension, even or uneven.

A dimension is always cut into sizes that differ by at most one; the first ranks get the remainder. The backward pass of
each function is the inverse mapping.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.link import link_of
from mindspeed_cp.compat.exchange import Group, dimension, start_all_to_all
from mindspeed_cp.sequence.runs import split_sizes as _split_sizes

__all__ = [
    "_gather",
    "_split",
    "all_to_all",
    "cal_split_sizes",
    "gather_forward_split_backward",
    "split_forward_gather_backward",
    "start_all_to_all",
]

GradScale = Literal["up", "down"] | None

GRAD_SCALES = ("up", "down", None)


def cal_split_sizes(dim_size: int, world_size: int) -> list[int]:
    """The sizes into which ``dim_size`` is cut for ``world_size`` ranks, the remainder on the first."""
    return _split_sizes(dim_size, world_size)


def all_to_all(
    input_: torch.Tensor,
    process_group: Group,
    scatter_dim: int = 2,
    gather_dim: int = 1,
    gather_size: int | None = None,
) -> torch.Tensor:
    """Scatter ``scatter_dim`` over the ranks and gather ``gather_dim``: (.., S, .., g, ..) -> (.., s, .., G, ..).

    Args:
        input_: 3-D or 4-D tensor with the whole ``scatter_dim`` and this rank's part of ``gather_dim``.
        process_group: the group, all of whose ranks call this; None for the default group.
        scatter_dim, gather_dim: two different dimensions; negative ones count from the end.
        gather_size: length of ``gather_dim`` over all ranks; None if it is equal on all ranks.

    Returns:
        a contiguous tensor; ``input_`` itself in a group of one rank.

    Raises:
        ValueError: the dimensions do not fit the tensor, or this rank's part is not its share of ``gather_size``.
    """
    return start_all_to_all(input_, process_group, scatter_dim, gather_dim, gather_size).wait()


def split_forward_gather_backward(
    input_: torch.Tensor,
    process_group: Group,
    dim: int,
    split_sizes: Sequence[int] | None = None,
    grad_scale: GradScale = "down",
) -> torch.Tensor:
    """Keep this rank's part of ``dim``; backward gathers the gradients of all parts.

    Args:
        input_: the same tensor on every rank.
        split_sizes: length of every rank's part, None for parts that differ by at most one.
        grad_scale: "up" or "down" multiplies or divides the gradient by the number of ranks, None leaves it.
    """
    dim, world_size = dimension(dim, input_.dim(), "dim"), dist.get_world_size(process_group)
    sizes = _checked_sizes(split_sizes, world_size, "split_sizes") or _split_sizes(input_.size(dim), world_size)
    if sum(sizes) != input_.size(dim):
        raise ValueError(
            f"split_sizes {sizes} must sum to {input_.size(dim)}, the length of dimension {dim}; "
            "leave them out for an even split."
        )
    _check_grad_scale(grad_scale)
    if world_size == 1:
        return input_
    part: torch.Tensor = _Split.apply(input_, process_group, dim, tuple(sizes), grad_scale)
    return part


def gather_forward_split_backward(
    input_: torch.Tensor,
    process_group: Group,
    dim: int,
    gather_sizes: Sequence[int] | None = None,
    grad_scale: GradScale = "up",
) -> torch.Tensor:
    """Join every rank's part along ``dim``; backward keeps this rank's part of the gradient.

    Args:
        input_: this rank's part.
        gather_sizes: length of every rank's part; None lets the ranks exchange their lengths, which waits for the
            device.
        grad_scale: "up" or "down" multiplies or divides the gradient by the number of ranks, None leaves it.
    """
    dim, world_size = dimension(dim, input_.dim(), "dim"), dist.get_world_size(process_group)
    _check_grad_scale(grad_scale)
    sizes = _checked_sizes(gather_sizes, world_size, "gather_sizes")
    if sizes is not None:
        rank = dist.get_rank(process_group)
        if sizes[rank] != input_.size(dim):
            raise ValueError(
                f"gather_sizes {sizes} give rank {rank} a length of {sizes[rank]}, and its tensor has "
                f"{input_.size(dim)} on dimension {dim}; pass the length of every rank's part in rank order."
            )
    if world_size == 1:
        return input_
    sizes = _lengths_of_all(input_, process_group, dim) if sizes is None else sizes
    whole: torch.Tensor = _Gather.apply(input_, process_group, dim, tuple(sizes), grad_scale)
    return whole


def _lengths_of_all(input_: torch.Tensor, group: Group, dim: int) -> list[int]:
    """The length of every rank's part; collective."""
    link, mine = link_of(group), torch.tensor([input_.size(dim)], device=input_.device)
    return [int(length) for length in link.gather(mine, [1] * link.size, "lengths").wait()]


@torch.no_grad()
def _split(input_: torch.Tensor, pg: Group, dim: int = -1, split_sizes: Sequence[int] | None = None) -> torch.Tensor:
    """``split_forward_gather_backward`` under MindSpeed's name for the part without gradients."""
    return split_forward_gather_backward(input_, pg, dim, split_sizes, None)


@torch.no_grad()
def _gather(input_: torch.Tensor, pg: Group, dim: int = -1, gather_sizes: Sequence[int] | None = None) -> torch.Tensor:
    """``gather_forward_split_backward`` under MindSpeed's name for the part without gradients."""
    return gather_forward_split_backward(input_, pg, dim, gather_sizes, None)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_: torch.Tensor, group: Group, dim: int, sizes: tuple[int, ...], grad_scale: GradScale
    ) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes, ctx.grad_scale = group, dim, sizes, grad_scale
        return _own_part(input_, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = _scaled(grad_output, ctx.grad_scale, len(ctx.sizes))
        return _gathered(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_: torch.Tensor, group: Group, dim: int, sizes: tuple[int, ...], grad_scale: GradScale
    ) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes, ctx.grad_scale = group, dim, sizes, grad_scale
        return _gathered(input_, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = _own_part(grad_output, ctx.group, ctx.dim, ctx.sizes)
        return _scaled(grad, ctx.grad_scale, len(ctx.sizes)), None, None, None, None


def _own_part(tensor: torch.Tensor, group: Group, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    rank = dist.get_rank(group)
    return tensor.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()


def _gathered(tensor: torch.Tensor, group: Group, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """All ranks' parts, concatenated along ``dim``."""
    shards = link_of(group).gather(tensor.movedim(dim, 0).contiguous(), list(sizes), "gather").wait()
    return torch.cat(shards).movedim(0, dim).contiguous()


def _scaled(grad: torch.Tensor, grad_scale: GradScale, world_size: int) -> torch.Tensor:
    if grad_scale is None:
        return grad
    return grad * world_size if grad_scale == "up" else grad / world_size


def _checked_sizes(sizes: Sequence[int] | None, world_size: int, name: str) -> list[int] | None:
    if sizes is not None and len(sizes) != world_size:
        raise ValueError(f"{name} {list(sizes)} must hold one length for each of the {world_size} ranks of the group.")
    return list(sizes) if sizes is not None else None


def _check_grad_scale(grad_scale: GradScale) -> None:
    if grad_scale not in GRAD_SCALES:
        raise ValueError(f"grad_scale {grad_scale!r} is not known; choose 'up', 'down' or None.")
