"""Pass a recurrent state from each rank to the next, and its gradient back.

Every rank holds one part of the sequence, in rank order. A single state travels, whatever the length. Ranks compute in
parallel: a recurrence that is linear in its first state is first computed for any first state (``linear_in_state``);
only then does the actual state go from rank to rank, and each rank applies that function to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.link import Link


@dataclass(frozen=True, eq=False)
class Chain:
    """The ranks of a sequence, each of which passes its last state to the next.

    Args:
        link: over the ranks, in the order of their parts.
        goes_on: per rank, whether its first token belongs to the same document as the token before it.
    """

    link: Link
    goes_on: tuple[bool, ...]

    @property
    def receives(self) -> bool:
        """Whether this rank starts from the state of the rank before it."""
        return self.goes_on[self.link.rank]

    @property
    def hands_on(self) -> bool:
        """Whether the next rank starts from this rank's last state."""
        return self.link.rank + 1 < self.link.size and self.goes_on[self.link.rank + 1]

    def first_state(self, shape: tuple[int, ...], dtype: torch.dtype, after: torch.Tensor) -> torch.Tensor:
        """Receive the state of the previous rank; only if ``receives``.

        Args:
            after: a tensor computed before; its backward pass runs after the state's gradient has been sent.
        """
        state: torch.Tensor = _Receive.apply(after, self, shape, dtype)
        return state

    def hand_on(self, out: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Send the last state to the next rank and return ``out``; backward first receives the state's gradient."""
        if not self.hands_on:
            return out
        handed: torch.Tensor = _HandOn.apply(out, state, self)
        return handed

    def send(self, state: torch.Tensor, step: int, purpose: str) -> None:
        self.link.exchange([(self.link.rank + step, [state.contiguous()])], (), purpose).wait()

    def receive(self, state: torch.Tensor, step: int, purpose: str) -> torch.Tensor:
        self.link.exchange((), [(self.link.rank + step, [state])], purpose).wait()
        return state


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, after: torch.Tensor, chain: Chain, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.chain = chain
        return chain.receive(after.new_empty(shape, dtype=dtype), -1, "state")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.chain.send(grad, -1, "dstate")
        return None, None, None, None


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, state: torch.Tensor, chain: Chain) -> torch.Tensor:
        ctx.chain = chain
        ctx.like = state.new_empty(0), state.shape
        chain.send(state, 1, "state")
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        like, shape = ctx.like
        return grad_out, ctx.chain.receive(like.new_empty(shape), 1, "dstate"), None
