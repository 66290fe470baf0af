"""Expansions, which compute keys and values for the kernel from the rows that travel.

Without an expansion, keys and values themselves travel. With one, two narrow tensors travel, such as the latent of
multi-latent attention and the rotated part of its keys. Each rank computes keys and values from them after they arrive,
for its own heads and the rows that its blocks need, and the rows' gradients from those of keys and values.

Shapes: rows (seq, batch, 1, rope) and (seq, batch, 1, rank), key (seq, batch, kv_heads, dk), value (seq, batch,
kv_heads, dv).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.messages import end_to_end
from mindspeed_cp.kernels.base import MemoryOrder, accumulation_dtype

Pair = tuple[torch.Tensor, torch.Tensor]
Sums = tuple[torch.Tensor | None, ...]  # sum of the gradient of each parameter; None if it is not needed


class Expansion(ABC):
    """Computes keys and values from two tensors with one head each, row by row.

    Attributes:
        parameters: tensors that it uses besides the rows; they get gradients.
        kv_heads, dk, dv: sizes of the keys and values that it computes.
        widths: elements per row of each of the two tensors that travel.
    """

    parameters: tuple[torch.Tensor, ...]
    kv_heads: int
    dk: int
    dv: int
    widths: tuple[int, int]

    @property
    @abstractmethod
    def flops(self) -> int:
        """FLOPs of computing the keys and values of one row; the gradient costs twice as many."""

    @abstractmethod
    def of_heads(self, queries: slice) -> "Expansion":
        """The expansion for some query heads; its parameters stay whole."""

    @abstractmethod
    def expand(self, rows: Pair, order: MemoryOrder | None = None) -> Pair:
        """(key, value) of these rows, in this memory order; None permits any strides."""

    @abstractmethod
    def gradients(self, rows: Pair, grads: Pair, sums: Sums) -> Pair:
        """The gradients of the rows from those of (key, value); adds the parameters' gradients to ``sums``."""

    def handed_over(self, sums: Sums) -> tuple[torch.Tensor | None, ...]:
        """The gradient to return to autograd for each parameter."""
        pairs = zip(sums, self.parameters, strict=True)
        return tuple(None if total is None else total.to(parameter.dtype) for total, parameter in pairs)

    def zeros(self, wanted: Sequence[bool]) -> Sums:
        """Initial sums of the parameters' gradients, in the accumulation dtype.

        Args:
            wanted: for each parameter, whether its gradient is needed.
        """
        return tuple(
            torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype)) if wants else None
            for parameter, wants in zip(self.parameters, wanted, strict=True)
        )


@dataclass(frozen=True, eq=False)
class LatentExpansion(Expansion):
    """The up-projection of multi-latent attention, for ``context_parallel_attention(..., expand=)``.

    (rope, latent) travel: the rotated part of the key, which all heads share, and the normalized latent. A head's key
    is [its part of the latent's projection, rope].

    Args:
        weight: (heads * (nope + dv), rank); for each head first the rows of its key, then those of its value.
        heads: attention heads of this tensor-parallel rank.
        nope, rope: elements of a key without and with positional encoding.
        dv: elements of a value.
        mine: the heads that it computes.
    """

    weight: torch.Tensor
    heads: int
    nope: int
    rope: int
    dv: int
    mine: slice = field(default_factory=lambda: slice(None), repr=False)

    def __post_init__(self) -> None:
        rows = self.heads * (self.nope + self.dv)
        if self.weight.dim() != 2 or self.weight.shape[0] != rows:
            raise ValueError(
                f"the up-projection has shape {tuple(self.weight.shape)} and must have {rows} rows, {self.heads} heads "
                f"x ({self.nope} of a key + {self.dv} of a value); pass the weight, heads, nope and dv of one module."
            )

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return (self.weight,)

    @property
    def kv_heads(self) -> int:  # type: ignore[override]
        return len(range(self.heads)[self.mine])

    @property
    def dk(self) -> int:  # type: ignore[override]
        return self.nope + self.rope

    @property
    def widths(self) -> tuple[int, int]:  # type: ignore[override]
        return self.rope, self.weight.shape[1]

    @property
    def flops(self) -> int:
        return 2 * self.weight.shape[1] * self.kv_heads * (self.nope + self.dv)

    def of_heads(self, queries: slice) -> "LatentExpansion":
        return replace(self, mine=queries)

    def expand(self, rows: Pair, order: MemoryOrder | None = None) -> Pair:
        rope, latent = rows
        made = torch.nn.functional.linear(latent.squeeze(2), self._mine(self.weight).flatten(0, 1))
        made = made.unflatten(-1, (self.kv_heads, -1))
        shape = (*made.shape[:3], self.dk)
        key = _empty(made, shape, order)
        key[..., : self.nope].copy_(made[..., : self.nope])
        key[..., self.nope :].copy_(rope.expand(-1, -1, self.kv_heads, -1))
        value = made[..., self.nope :]
        if order is not None:
            value = _empty(made, (*shape[:3], self.dv), order).copy_(value)
        return key, value

    def gradients(self, rows: Pair, grads: Pair, sums: Sums) -> Pair:
        (rope, latent), (d_key, d_value) = rows, grads
        made = latent.new_empty((*d_key.shape[:3], self.nope + self.dv))
        made[..., : self.nope].copy_(d_key[..., : self.nope])
        made[..., self.nope :].copy_(d_value)
        flat = made.flatten(0, 1).flatten(1)
        if sums[0] is not None:
            part = flat.t() @ latent.reshape(len(flat), -1)
            self._mine(sums[0]).add_(part.unflatten(0, (self.kv_heads, -1)))
        d_latent = (flat @ self._mine(self.weight).flatten(0, 1)).view(latent.shape)
        d_rope = d_key[..., self.nope :].sum(2, keepdim=True, dtype=accumulation_dtype(rope.dtype))
        return d_rope, d_latent

    def _mine(self, weight: torch.Tensor) -> torch.Tensor:
        """(heads of mine, nope + dv, rank), a view."""
        mine: torch.Tensor = weight.detach().unflatten(0, (self.heads, -1))[self.mine]
        return mine


def _empty(like: torch.Tensor, shape: Sequence[int], order: MemoryOrder | None) -> torch.Tensor:
    size = tuple(shape)
    return end_to_end(like.new_empty(math.prod(size)), [size], order)[0]


class _Expanded(torch.autograd.Function):
    """(rows, rows, parameters ...) -> (key, value), for a rank's own rows."""

    @staticmethod
    def forward(
        ctx: Any, first: torch.Tensor, second: torch.Tensor, expansion: Expansion, *parameters: torch.Tensor
    ) -> Pair:
        ctx.expansion = expansion
        ctx.save_for_backward(first, second, *parameters)
        key, value = expansion.expand((first, second))
        return key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, second, *_ = ctx.saved_tensors
        sums = ctx.expansion.zeros(ctx.needs_input_grad[3:])
        gradients = ctx.expansion.gradients((first, second), cast(Pair, grads), sums)
        rows = tuple(gradient.to(first.dtype) for gradient in gradients)
        return *rows, None, *ctx.expansion.handed_over(sums)


def expanded(first: torch.Tensor, second: torch.Tensor, expansion: Expansion) -> Pair:
    """(key, value) of a rank's own rows, differentiable; for the exchange of heads."""
    key, value = _Expanded.apply(first, second, expansion, *expansion.parameters)
    return key, value
