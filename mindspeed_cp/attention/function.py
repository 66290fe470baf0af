"""The only autograd function, for every algorithm: Ulysses' exchange around the ring engine.

Forward: heads are scattered over the Ulysses group, the ring computes, the output's heads are gathered. Backward does
the same in reverse. A part with one rank does nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.expansion import Expansion, Sums
from mindspeed_cp.attention.kept import Computed, ComputedHeads, KeptAttention, Stamp
from mindspeed_cp.attention.kv_cache import NAMES, Name
from mindspeed_cp.attention.merging import add_softmax_offset, softmax_offset_gradient
from mindspeed_cp.attention.ring import RingProblem, own_rows, ring_backward, ring_forward
from mindspeed_cp.attention.ulysses import UlyssesProblem
from mindspeed_cp.kernels.base import accumulation_dtype
from mindspeed_cp.kernels.merge import add_in_place

INPUTS = 5  # inputs of the autograd function before the parameters of an expansion


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call: the ring's problem, and Ulysses' problem if its group has more than one rank.

    Args:
        layer_number: global, from 1.
        has_backward: whether a backward pass may follow, for which forward must save tensors.
        kept: KeptAttention of the checkpoint around the call, whose recomputation reuses the first pass.
        expansion: computes keys and values from the tensors that travel; None if they travel themselves.
    """

    ring: RingProblem
    ulysses: UlyssesProblem | None = None
    layer_number: int = 1
    has_backward: bool = True
    kept: KeptAttention | None = None
    expansion: Expansion | None = None

    def _expansion(self, heads: slice = slice(None)) -> Expansion | None:
        """The expansion for this rank's heads."""
        return None if self.expansion is None else self.expansion.of_heads(heads)

    @property
    def refetch(self) -> frozenset[Name]:
        """Which of key and value are saved before Ulysses' exchange and exchanged again in backward."""
        return frozenset() if self.ulysses is None else self.ulysses.refetch

    def without_communication(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Index in ``Computed.saved`` -> a tensor that the rank has without communication: in a pure ring all of its
        own tensors, else those saved before Ulysses' exchange.
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
            num_rounds=1 if self.ulysses is None else self.ulysses.num_groups,
            expands=self.expansion is not None,
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
            own = tuple(local[place] for place in range(3))
            heads = self._attend(own, softmax_offset, dtype, local, self._expansion())
            return Computed(heads.out, self._for_backward([heads]))
        rounds, done, leaving = self.ulysses.rounds, list[ComputedHeads](), None
        result = self.ulysses.all_heads("out", query, dtype)
        arriving = rounds[0].scatter(query, key, value)
        stay: tuple[torch.Tensor, ...] = ()
        for this, following in zip_longest(rounds, rounds[1:]):
            here = _with_keys_that_stay(this, arriving.wait(), stay)
            if following:
                arriving = following.scatter(query, key, value)
            stay = here[1:] if following and following.keys_stay else ()
            here = own_rows(self.ring, *here)
            offset = None if softmax_offset is None else softmax_offset[this.head_slice()]
            heads = self._attend(here, offset, dtype, local, self._expansion(this.head_slice()))
            if leaving is not None:
                leaving.wait()
            leaving = this.gather({"out": result}, {"out": heads.out})
            done += self._for_backward([heads])
            del here, heads  # free them while the next round is computed
        assert leaving is not None
        leaving.wait()
        return Computed(result.result(), tuple(done))

    def _attend(
        self,
        own: tuple[torch.Tensor, ...],
        offset: torch.Tensor | None,
        dtype: torch.dtype,
        local: dict[int, torch.Tensor],
        expansion: Expansion | None,
    ) -> ComputedHeads:
        """Attention of this rank's heads: ``own_rows`` of query, key and value, and their softmax offsets."""
        query, *keys_values = own
        out, lse, saved, blocks = ring_forward(self.ring, query, tuple(keys_values), expansion)
        if offset is not None:
            if out.dtype != lse.dtype:
                out = out.to(lse.dtype)
            add_softmax_offset(out, lse, offset)
        out = out.to(dtype)
        # Rows without a key have lse -inf; with +inf, exp(score - lse) is 0 in backward.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        needed = tuple(None if place in local else tensor for place, tensor in enumerate((query, *saved)))
        return ComputedHeads(out, lse, needed, blocks)

    def _for_backward(self, rounds: list[ComputedHeads]) -> tuple[ComputedHeads, ...]:
        return tuple(rounds) if self.has_backward else ()

    def differentiate(
        self,
        grad_out: torch.Tensor,
        rounds: tuple[ComputedHeads, ...],
        softmax_offset: torch.Tensor | None,
        local: dict[int, torch.Tensor],
        sums: Sums = (),
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """([dq, dk, dv], gradient of the softmax offsets); adds those of the expansion's parameters to ``sums``."""
        d_offset = None if softmax_offset is None else torch.zeros_like(softmax_offset)
        if self.ulysses is None:
            query, *kept = (local.get(place, tensor) for place, tensor in enumerate(rounds[0].saved))
            self._add_offset_gradient(d_offset, softmax_offset, grad_out, rounds[0], slice(None))
            return list(self._gradients(grad_out, rounds[0], query, kept, self._expansion(), sums)), d_offset
        again: dict[str, torch.Tensor] = {
            name: local[place] for place, name in zip((1, 2), NAMES) if name in self.refetch
        }
        problems, dtype, leaving = self.ulysses.rounds, grad_out.dtype, None
        into = {f"grad_{kind}": self.ulysses.all_heads(f"grad_{kind}", grad_out, dtype) for kind in ("query", *NAMES)}
        arriving, here, staying = (
            problems[0].scatter_for_backward(grad_out, again),
            dict[str, torch.Tensor](),
            KeptSums(),
        )
        for number, (this, heads) in enumerate(zip(problems, rounds, strict=True)):
            arrived = arriving.wait()
            here |= {name: tensor for name, tensor in arrived.items() if tensor.shape[2] or not this.keys_stay}
            if number + 1 < len(problems):
                arriving = problems[number + 1].scatter_for_backward(grad_out, again)
            query, *kept = heads.saved
            kept = [here[name] if name in again else tensor for name, tensor in zip(NAMES, kept)] + kept[len(NAMES) :]
            expansion = self._expansion(this.head_slice())
            grads = self._gradients(here["grad_out"], heads, query, kept, expansion, sums)
            self._add_offset_gradient(d_offset, softmax_offset, here["grad_out"], heads, this.head_slice())
            if leaving is not None:
                leaving.wait()
            leaving = this.gather(into, dict(zip(into, (grads[0], *staying.add(grads[1:], this.keys_are_done)))))
        assert leaving is not None
        leaving.wait()
        return [gathered.result() for gathered in into.values()], d_offset

    def _gradients(
        self,
        grad_out: torch.Tensor,
        heads: ComputedHeads,
        query: torch.Tensor | None,
        kept: Sequence[torch.Tensor | None],
        expansion: Expansion | None,
        sums: Sums,
    ) -> tuple[torch.Tensor, ...]:
        assert query is not None
        return ring_backward(
            self.ring,
            grad_out,
            query,
            heads.out,
            heads.lse,
            tuple(tensor for tensor in kept if tensor is not None),
            heads.blocks,
            expansion,
            sums,
        )

    @staticmethod
    def _add_offset_gradient(
        total: torch.Tensor | None,
        offset: torch.Tensor | None,
        grad_out: torch.Tensor,
        heads: ComputedHeads,
        share: slice,
    ) -> None:
        if total is not None and offset is not None:
            total[share] = softmax_offset_gradient(grad_out, heads.out, heads.lse, offset[share])


class KeptSums:
    """Sums of the gradients of keys and values that stay for several rounds, until they are sent."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] | None = None

    def add(self, grads: tuple[torch.Tensor, ...], are_done: bool) -> list[torch.Tensor]:
        """Add these gradients; returns the sums so far, and resets them if they ``are_done``."""
        if self._sums is None and are_done:
            return list(grads)
        if self._sums is None:
            self._sums = [grad.to(accumulation_dtype(grad.dtype), copy=True) for grad in grads]
        else:
            for total, grad in zip(self._sums, grads):
                add_in_place(total, grad)
        sums, self._sums = self._sums, None if are_done else self._sums
        return sums


def _with_keys_that_stay(
    this: UlyssesProblem, arrived: tuple[torch.Tensor | None, ...], stay: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """(query, key, value) of a round: with the keys and values that arrived, or those of the previous round."""
    query, *keys_values = arrived
    assert query is not None
    if this.keys_stay:
        return query, *stay
    empty = (
        query.new_empty((*query.shape[:2], 0, dim)) for dim in (this.key_dim, this.value_dim)
    )  # for a rank without a head
    return query, *(none if tensor is None else tensor for tensor, none in zip(keys_values, empty))


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager that switches autocast off; meta tensors, used by the planner's dry run, have none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class ContextParallelAttention(torch.autograd.Function):
    """query, key, value (seq_local, batch, heads, dim), softmax_offset (heads,) or None, the call, parameters of its
    expansion -> (seq_local, batch, heads, dv).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_offset: torch.Tensor | None,
        call: AttentionCall,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        # Dtypes are chosen here and in the kernels; autocast would round sums that are accumulated in float32.
        with _without_autocast(query.device):
            return ContextParallelAttention._forward(ctx, query, key, value, softmax_offset, call, parameters)

    @staticmethod
    def _forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_offset: torch.Tensor | None,
        call: AttentionCall,
        parameters: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        local = call.without_communication(query, key, value)

        def compute() -> Computed:
            with call.ring.groups.one_pass():
                return call.compute(query, key, value, softmax_offset, local)

        if call.kept is None:
            found = compute()
        else:
            found = call.kept.once(call.stamp(query, key, value), query.device, compute)
        ctx.call, ctx.places = call, list(local)
        ctx.rounds = [(len(heads.tensors), heads.blocks) for heads in found.rounds]
        tensors = (tensor for heads in found.rounds for tensor in heads.tensors)
        ctx.save_for_backward(softmax_offset, *parameters, *local.values(), *tensors)
        return found.result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with _without_autocast(grad_out.device):
            return ContextParallelAttention._backward(ctx, grad_out)

    @staticmethod
    def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: AttentionCall = ctx.call
        softmax_offset, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[INPUTS:]
        del saved[: len(wanted)]  # the expansion's parameters, which it holds itself; they are unchanged
        local = dict(zip(ctx.places, saved))
        of_rounds, rounds = iter(saved[len(local) :]), []
        for count, blocks in ctx.rounds:
            out, lse, *tensors = islice(of_rounds, count)
            rounds.append(ComputedHeads(out, lse, tuple(tensors), blocks))
        sums = () if call.expansion is None else call.expansion.zeros(wanted)
        with call.ring.groups.one_pass():
            (dq, dk, dv), d_offset = call.differentiate(grad_out, tuple(rounds), softmax_offset, local, sums)
        of_parameters = () if call.expansion is None else call.expansion.handed_over(sums)
        dtype = grad_out.dtype
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_offset, None, *of_parameters
