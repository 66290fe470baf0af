"""An all-to-all of any tensor along two of its dimensions, which may overlap other computation in both directions."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.link import link_of
from mindspeed_cp.comm.messages import Message, Pending
from mindspeed_cp.comm.meter import record
from mindspeed_cp.sequence.runs import split_sizes

Group = dist.ProcessGroup | None
Route = tuple[Group, int, int, int]  # process group, scatter_dim, gather_dim, gather_size


def checked_dimensions(
    input_: torch.Tensor, process_group: Group, scatter_dim: int, gather_dim: int, gather_size: int | None
) -> Route:
    """(process_group, scatter_dim, gather_dim, gather_size) with non-negative dimensions and no None.

    Raises:
        ValueError: the dimensions do not fit the tensor, or this rank's part is not its share of ``gather_size``.
    """
    if input_.dim() not in (3, 4):
        raise ValueError(
            f"all_to_all takes tensors of 3 or 4 dimensions, not {tuple(input_.shape)}; view it as one of those."
        )
    scatter_dim, gather_dim = (
        dimension(dim, input_.dim(), name) for dim, name in ((scatter_dim, "scatter_dim"), (gather_dim, "gather_dim"))
    )
    if scatter_dim == gather_dim:
        raise ValueError(
            f"scatter_dim and gather_dim are both {scatter_dim} and must differ; name the dimension to "
            "cut and the dimension to join."
        )
    world_size = dist.get_world_size(process_group)
    if gather_size is None:
        gather_size = input_.size(gather_dim) * world_size
    share = split_sizes(gather_size, world_size)[dist.get_rank(process_group)]
    if share != input_.size(gather_dim):
        raise ValueError(
            f"gather_size {gather_size} gives rank {dist.get_rank(process_group)} of {world_size} a "
            f"length of {share} on dimension {gather_dim}, and its tensor has {input_.size(gather_dim)}; "
            f"split with cal_split_sizes({gather_size}, {world_size}), or pass the sum of all lengths."
        )
    return process_group, scatter_dim, gather_dim, gather_size


def dimension(dim: int, num_dims: int, name: str) -> int:
    if not -num_dims <= dim < num_dims:
        raise ValueError(
            f"{name} {dim} does not exist in a tensor of {num_dims} dimensions; choose 0 to {num_dims - 1}."
        )
    return dim % num_dims


def start_exchange(
    tensor: torch.Tensor, group: Group, scatter_dim: int, gather_dim: int, gather_size: int
) -> Pending[torch.Tensor]:
    """Start one all-to-all; returns a Pending of its result. A tensor whose dimension is the first is not copied."""
    link = link_of(group)
    sizes = split_sizes(tensor.size(scatter_dim), link.size)
    pieces = tensor.split(sizes, dim=scatter_dim)
    shape = list(tensor.shape)
    shape[scatter_dim], shape[gather_dim] = sizes[link.rank], gather_size
    result = tensor.new_empty(shape)
    joined = result.split(split_sizes(gather_size, link.size), dim=gather_dim)
    leaving, arriving = ([Message(((part,),), tensor.dtype) for part in parts] for parts in (pieces, joined))
    pending = link.all_to_all(leaving, arriving, "all_to_all")
    record({"all_to_all": (tensor.numel() - pieces[link.rank].numel()) * tensor.element_size()})
    return pending.then(lambda _: result)


def start_all_to_all(
    input_: torch.Tensor,
    process_group: Group,
    scatter_dim: int = 2,
    gather_dim: int = 1,
    gather_size: int | None = None,
) -> "PendingTensor":
    """``all_to_all`` that returns immediately: a ``PendingTensor``, whose ``wait`` returns the result.

    Whatever is computed in between overlaps the exchange. Backward does the same in reverse: the gradient is sent where
    ``wait`` was called, and awaited only when ``input_``'s gradient is needed. So with separate projections ::

        query, key, value = (start_all_to_all(project(hidden), group) for project in (to_query, to_key, to_value))
        out = attention(query.wait(), key.wait(), value.wait())

    each exchange overlaps the next projection in forward, and the projections' backward passes. All ranks must start
    and wait in the same order; ``input_`` must not be changed in place before ``wait``.
    """
    return PendingTensor(input_, *checked_dimensions(input_, process_group, scatter_dim, gather_dim, gather_size))


class PendingTensor:
    """The future result of ``start_all_to_all``."""

    def __init__(self, input_: torch.Tensor, group: Group, scatter_dim: int, gather_dim: int, gather_size: int) -> None:
        self._result: torch.Tensor | None = None
        self._flight: _Flight | None = None
        if dist.get_world_size(group) == 1:
            self._result = input_
        else:
            self._flight = _Flight(group, scatter_dim, gather_dim, gather_size, input_.size(scatter_dim))
            self._token = _Depart.apply(input_, self._flight)

    def wait(self) -> torch.Tensor:
        """Wait for the tensor; every call returns the same one."""
        if self._result is None:
            self._result = _Arrive.apply(self._token, self._flight)
        assert self._result is not None
        return self._result


class _Flight:
    """The exchange that is under way, shared by the two ends of a pending all-to-all."""

    def __init__(self, group: Group, scatter_dim: int, gather_dim: int, gather_size: int, scatter_size: int) -> None:
        self.forward = group, scatter_dim, gather_dim, gather_size
        self.backward = group, gather_dim, scatter_dim, scatter_size
        self._pending: Pending[torch.Tensor] | None = None

    def depart(self, tensor: torch.Tensor, route: Route) -> None:
        self._pending = start_exchange(tensor, *route)

    def arrive(self) -> torch.Tensor:
        """Wait for the result and release the buffers of the exchange."""
        pending, self._pending = self._pending, None
        assert pending is not None
        return pending.wait()


class _Depart(torch.autograd.Function):
    """Starts an exchange; an empty token connects it to ``_Arrive``, so that autograd calls them in order."""

    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        flight.depart(input_, flight.forward)
        return input_.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flight: _Flight = ctx.flight
        return flight.arrive(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.flight.depart(grad_output, ctx.flight.backward)
        return grad_output.new_empty(0), None
