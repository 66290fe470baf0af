"""The one autograd function: Ulysses' exchange around the ring engine, for every algorithm.

Forward: heads are scattered over the Ulysses group, the ring computes, the output's heads are gathered. Backward is the
same in reverse. A part that has one rank does nothing.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.algorithms.kv_cache import NAMES, Name
from mindspeed_cp.algorithms.ring import RingProblem, RingSaved, ring_backward, ring_forward
from mindspeed_cp.algorithms.ulysses import UlyssesProblem
from mindspeed_cp.softmax import add_softmax_offset, softmax_offset_gradient


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call: the ring's problem, and Ulysses' where the group has more than one rank."""

    ring: RingProblem
    ulysses: UlyssesProblem | None = None

    @property
    def refetch(self) -> frozenset[Name]:
        """Which of key and value are saved before Ulysses' communication, and communicated again in backward."""
        return frozenset() if self.ulysses is None else self.ulysses.refetch

    def local_offset(self, softmax_offset: torch.Tensor) -> torch.Tensor:
        return softmax_offset if self.ulysses is None else softmax_offset[self.ulysses.head_slice()]


class ContextParallelAttention(torch.autograd.Function):
    """query, key, value (seq_local, batch, heads, dim), softmax_offset (heads,) or None -> (seq_local, batch, heads,
    dv).
    """

    @staticmethod
    def forward(ctx, query, key, value, softmax_offset, call):
        # The dtypes are chosen here and in the kernels; autocast would round what is accumulated in float32.
        with torch.autocast(query.device.type, enabled=False):
            return ContextParallelAttention._forward(ctx, query, key, value, softmax_offset, call)

    @staticmethod
    def _forward(ctx, query, key, value, softmax_offset, call):
        dtype, before = query.dtype, {"key": key, "value": value}
        if call.ulysses:
            query, key, value = call.ulysses.scatter(query, key, value)
        out, lse, saved = ring_forward(call.ring, query, key, value)
        if softmax_offset is not None:
            if out.dtype != lse.dtype:
                out = out.to(lse.dtype)
            add_softmax_offset(out, lse, call.local_offset(softmax_offset))
        out = out.to(dtype)
        result = call.ulysses.gather_out(out, dtype) if call.ulysses else out
        # Rows without a key have lse -inf; +inf makes exp(score - lse) 0 in backward.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        ctx.call, ctx.rngs, kept = call, saved.rngs, saved.tensors
        if call.refetch:
            kept = tuple(before[name] if name in call.refetch else tensor for name, tensor in zip(NAMES, kept))
        ctx.save_for_backward(query, out, lse, softmax_offset, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        with torch.autocast(grad_out.device.type, enabled=False):
            return ContextParallelAttention._backward(ctx, grad_out)

    @staticmethod
    def _backward(ctx, grad_out):
        call, (query, out, lse, softmax_offset, *kept) = ctx.call, ctx.saved_tensors
        dtype = query.dtype
        if call.ulysses:
            again = {name: tensor for name, tensor in zip(NAMES, kept) if name in call.refetch}
            grad_out, fetched = call.ulysses.scatter_for_backward(grad_out, again)
            if again:
                kept = [fetched.get(name, tensor) for name, tensor in zip(NAMES, kept)]
        grads = ring_backward(call.ring, grad_out, query, out, lse, RingSaved(tuple(kept), ctx.rngs))
        d_offset = None
        if softmax_offset is not None:
            d_offset = torch.zeros_like(softmax_offset)
            local = call.local_offset(d_offset)
            local.copy_(softmax_offset_gradient(grad_out, out, lse, call.local_offset(softmax_offset)))
        if call.ulysses:
            grads = call.ulysses.gather_gradients(*grads, dtype)
        return *(grad.to(dtype) for grad in grads), d_offset, None
