"""An all-to-all that overlaps other computation, forward and backward."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.messages import Pending
from mindspeed_cp.compat.exchange import Group, Route, checked_dimensions, start_exchange


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
