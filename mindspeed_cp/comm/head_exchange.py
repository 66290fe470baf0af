"""Split a layer by heads: each rank computes some heads over the whole sequence, as in Ulysses and recurrent layers.

s: tokens of this rank, S: tokens of the whole sequence. Several tensors are sent in one message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.sequence_exchange import Part, SequenceExchange


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """The all-to-all around a layer whose heads are split over the ranks.

    Args:
        exchange: exchange over the whole group; its rows are each rank's part of the sequence.
        parts: the tensors that are sent together, and which of their heads each rank gets.
        gradients: prefix of a part's purpose when its gradient is counted.
    """

    exchange: SequenceExchange
    parts: Sequence[Part]
    gradients: str = ""

    def to_sequence(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(s, batch, heads, dim) -> (S, batch, heads of this rank, dim), in sequence order."""
        found: tuple[torch.Tensor, ...] = _Exchanged.apply(self, True, *tensors)
        return found

    def to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(S, batch, heads of this rank, dim) -> (s, batch, heads, dim), in the order in which this rank holds them."""
        found: tuple[torch.Tensor, ...] = _Exchanged.apply(self, False, *tensors)
        return found

    def _exchanged(
        self, to_sequence: bool, tensors: Sequence[torch.Tensor], prefix: str = ""
    ) -> tuple[torch.Tensor, ...]:
        parts = [replace(part, purpose=prefix + part.purpose) for part in self.parts] if prefix else self.parts
        if to_sequence:
            return tuple(self.exchange.scatter_heads_gather_sequence(parts, tensors).wait())
        return tuple(self.exchange.scatter_sequence_gather_heads(parts, tensors, tensors[0].dtype).wait())


class _Exchanged(torch.autograd.Function):
    """Exchange in one direction; its gradient is exchanged in the other."""

    @staticmethod
    def forward(
        ctx: Any, exchange: HeadExchange, to_sequence: bool, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.to_sequence = exchange, to_sequence
        return exchange._exchanged(to_sequence, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        exchange: HeadExchange = ctx.exchange
        return None, None, *exchange._exchanged(not ctx.to_sequence, grads, exchange.gradients)
