"""The one autograd function: Ulysses' exchange around the ring engine, for every algorithm.

Forward: heads are scattered over the Ulysses group, the ring computes, the output's heads are gathered. Backward is the
same in reverse. A part that has one rank does nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.kept import Computed, KeptAttention, Stamp
from mindspeed_cp.attention.kv_cache import NAMES, Name
from mindspeed_cp.attention.merging import add_softmax_offset, softmax_offset_gradient
from mindspeed_cp.attention.ring import RingProblem, RingSaved, own_rows, ring_backward, ring_forward
from mindspeed_cp.attention.ulysses import UlyssesProblem


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call: the ring's problem, and Ulysses' where the group has more than one rank.

    Args:
        layer_number: global, 1-based.
        kept: of the checkpoint around the call, whose recomputation takes what its first pass computed.
    """

    ring: RingProblem
    ulysses: UlyssesProblem | None = None
    layer_number: int = 1
    kept: KeptAttention | None = None

    @property
    def refetch(self) -> frozenset[Name]:
        """Which of key and value are saved before Ulysses' communication, and communicated again in backward."""
        return frozenset() if self.ulysses is None else self.ulysses.refetch

    def without_communication(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Place in ``Computed.saved`` -> what the rank has there without communication: all of its own in a ring alone,
        and what is saved before Ulysses' exchange.
        """
        if self.ulysses is None:
            return dict(enumerate(own_rows(self.ring, query, key, value)))
        return {place: rows for place, name, rows in zip((1, 2), NAMES, (key, value)) if name in self.refetch}

    def stamp(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Stamp:
        ring, dense = self.ring, self.ring.dense_mask
        return Stamp(
            layer_number=self.layer_number,
            query=query.shape,
            key=key.shape,
            value=value.shape,
            dtype=query.dtype,
            softmax_scale=ring.options.softmax_scale,
            dropout_p=ring.options.dropout_p,
            exchange=ring.exchange,
            keep=ring.keep,
            refetch=self.refetch,
            layout=ring.layout,
            masks=ring.masks,
            dense_mask=None if dense is None else dense.shape,
        )

    def compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_offset: torch.Tensor | None,
        local: dict[int, torch.Tensor],
    ) -> Computed:
        """Run the call; ``local`` is what ``without_communication`` returned."""
        dtype = query.dtype
        if self.ulysses is None:
            query, *own = (local[place] for place in range(3))
        else:
            query, *own = own_rows(self.ring, *self.ulysses.scatter(query, key, value))
        out, lse, saved = ring_forward(self.ring, query, tuple(own))
        if softmax_offset is not None:
            if out.dtype != lse.dtype:
                out = out.to(lse.dtype)
            add_softmax_offset(out, lse, self.local_offset(softmax_offset))
        out = out.to(dtype)
        result = self.ulysses.gather_out(out, dtype) if self.ulysses else out
        # Rows without a key have lse -inf; +inf makes exp(score - lse) 0 in backward.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        tensors = (query, *saved.tensors)
        kept = tuple(None if place in local else tensor for place, tensor in enumerate(tensors))
        return Computed(result, out, lse, kept, saved.blocks)

    def local_offset(self, softmax_offset: torch.Tensor) -> torch.Tensor:
        return softmax_offset if self.ulysses is None else softmax_offset[self.ulysses.head_slice()]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Meta tensors, with which the planner runs dry, have no autocast to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class ContextParallelAttention(torch.autograd.Function):
    """query, key, value (seq_local, batch, heads, dim), softmax_offset (heads,) or None -> (seq_local, batch, heads,
    dv).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_offset: torch.Tensor | None,
        call: AttentionCall,
    ) -> torch.Tensor:
        # The dtypes are chosen here and in the kernels; autocast would round what is accumulated in float32.
        with _without_autocast(query.device):
            return ContextParallelAttention._forward(ctx, query, key, value, softmax_offset, call)

    @staticmethod
    def _forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_offset: torch.Tensor | None,
        call: AttentionCall,
    ) -> torch.Tensor:
        local = call.without_communication(query, key, value)
        compute = partial(call.compute, query, key, value, softmax_offset, local)
        if call.kept is None:
            found = compute()
        else:
            found = call.kept.once(call.stamp(query, key, value), query.device, compute)
        ctx.call, ctx.blocks = call, found.blocks
        rows, *kept = (local.get(place, tensor) for place, tensor in enumerate(found.saved))
        ctx.save_for_backward(rows, found.out, found.lse, softmax_offset, *kept)
        return found.result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with _without_autocast(grad_out.device):
            return ContextParallelAttention._backward(ctx, grad_out)

    @staticmethod
    def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: AttentionCall = ctx.call
        (query, out, lse, softmax_offset, *kept) = ctx.saved_tensors
        dtype = query.dtype
        if call.ulysses:
            again: dict[str, torch.Tensor] = {name: tensor for name, tensor in zip(NAMES, kept) if name in call.refetch}
            grad_out, fetched = call.ulysses.scatter_for_backward(grad_out, again)
            if again:
                kept = [fetched.get(name, tensor) for name, tensor in zip(NAMES, kept)]
        saved = RingSaved(tuple(kept), ctx.blocks)
        dq, dk, dv = ring_backward(call.ring, grad_out, query, out, lse, saved)
        d_offset = None
        if softmax_offset is not None:
            d_offset = torch.zeros_like(softmax_offset)
            local = call.local_offset(d_offset)
            local.copy_(softmax_offset_gradient(grad_out, out, lse, call.local_offset(softmax_offset)))
        if call.ulysses:
            dq, dk, dv = call.ulysses.gather_gradients(dq, dk, dv, dtype)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_offset, None
