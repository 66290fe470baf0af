"""Attention kept across recomputation: stored in the first pass of a checkpointed function, reused in the second.

A checkpoint runs its function twice, without a graph in the forward pass and again in the backward pass. Everything is
computed twice, including the slowest part, attention and its communication. One ``KeptAttention`` belongs to one
checkpoint and holds the results of its attention calls, in the order of the calls.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch

from mindspeed_cp.kernels.random_stream import default_generator
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.slice_mask import SliceMask
from mindspeed_cp.settings.notices import warn_rank0

WAY_OUT = (
    "a checkpointed function must do the same in both passes; make it so, or leave out --cp-keep-attention (kept=None)."
)


class Stamp(NamedTuple):
    """The properties that a call of attention and its recomputation must have in common."""

    layer_number: int
    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtype: torch.dtype
    softmax_scale: float
    dropout_p: float
    exchange: str
    keep: frozenset[str]
    refetch: frozenset[str]
    layout: SequenceLayout
    masks: tuple[SliceMask, ...]
    dense_mask: torch.Size | None
    num_rounds: int
    expands: bool


@dataclass(frozen=True)
class ComputedHeads:
    """What backward needs for the heads of one round.

    Args:
        out, lse: for this rank's rows and heads.
        saved: query, and the keys and values from which backward starts; None for tensors that the rank has without
            communication, since the next pass has them as well.
        blocks: what the kernel saved for each block.
    """

    out: torch.Tensor
    lse: torch.Tensor
    saved: tuple[torch.Tensor | None, ...]
    blocks: tuple[Any, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.out, self.lse, *self.saved

    def with_tensors(self, tensors: Sequence[torch.Tensor | None]) -> "ComputedHeads":
        out, lse, *saved = tensors
        assert out is not None and lse is not None
        return ComputedHeads(out, lse, tuple(saved), self.blocks)


@dataclass(frozen=True)
class Computed:
    """The result of one attention call.

    Args:
        result: the output for the caller.
        rounds: what backward needs, per group of heads; empty if no backward pass follows.
    """

    result: torch.Tensor
    rounds: tuple[ComputedHeads, ...]

    def detached(self) -> "Computed":
        """The same memory in detached tensors, because the caller's tensors may refer to the checkpoint itself."""
        rounds = tuple(
            heads.with_tensors([None if tensor is None else tensor.detach() for tensor in heads.tensors])
            for heads in self.rounds
        )
        return Computed(self.result.detach(), rounds)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.result, *(tensor for heads in self.rounds for tensor in heads.tensors if tensor is not None)]


class _KeptCall(NamedTuple):
    stamp: Stamp
    computed: Computed
    fingerprint: list[tuple[int, int]]
    random_before: list[torch.Tensor]
    random_after: list[torch.Tensor]


class KeptAttention:
    """The attention of one checkpoint, kept for its recomputation; make a new one for every checkpoint.

    The recomputation then runs no forward kernel of attention and communicates nothing for it; gradients are bitwise
    the same. With torch's checkpoint::

        kept = KeptAttention()
        checkpoint(layer, x, kept, use_reentrant=False, context_fn=kept.contexts)

    where ``layer`` passes ``kept`` on to ``context_parallel_attention``. A second recomputation, by another backward
    pass through a retained graph, computes attention again.

    Args:
        outer: KeptAttention of a checkpoint around this one.
    """

    def __init__(self, outer: "KeptAttention | None" = None) -> None:
        self._outer = outer
        self._calls: deque[_KeptCall] = deque()
        self._phase: Literal["new", "keeping", "kept", "taking", "spent"] = "new"

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """(context of the first pass, context of later passes): the ``context_fn`` of torch's checkpoint."""
        return _Pass(self._begin, self._end), _Pass(self._begin_again, self._end_again)

    @property
    def is_active(self) -> bool:
        """Whether a pass is running; then a backward pass will follow, even if no tensor requires a gradient now."""
        return self._phase in ("keeping", "taking") or (self._outer is not None and self._outer.is_active)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now, counting every storage once."""
        storages = [tensor.untyped_storage() for call in self._calls for tensor in call.computed.tensors]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def once(self, stamp: Stamp, device: torch.device, compute: Callable[[], Computed]) -> Computed:
        """The result of ``compute``, now or in the first pass; random generators advance as if it had run.

        Raises:
            ValueError: the passes differ, or kept tensors were changed in place; the message says which.
        """
        if torch.is_inference_mode_enabled():
            return compute()  # no backward pass and thus no recomputation follows
        call = self._taken(stamp, device)
        if call is not None:
            self._keep(call)
            return call.computed
        before = _random_states(stamp, device)
        computed = compute()
        own = computed.detached()
        self._keep(_KeptCall(stamp, own, _fingerprint(own), before, _random_states(stamp, device)))
        return computed

    def _keep(self, call: _KeptCall) -> None:
        if self._phase == "keeping":
            self._calls.append(call)
        if self._outer is not None:
            self._outer._keep(call)

    def _taken(self, stamp: Stamp, device: torch.device) -> _KeptCall | None:
        if self._phase != "taking":
            return None if self._outer is None else self._outer._taken(stamp, device)
        if not self._calls:
            raise ValueError(
                f"recomputation calls attention (layer {stamp.layer_number}) more often than the first pass did; "
                + WAY_OUT
            )
        call = self._calls.popleft()
        for name, first, again in zip(Stamp._fields, call.stamp, stamp):
            if first != again:
                raise ValueError(
                    f"attention of layer {stamp.layer_number}: {name} is {again} in the recomputation and was {first} "
                    f"in the first pass; {WAY_OUT}"
                )
        if _fingerprint(call.computed) != call.fingerprint:
            raise ValueError(
                f"the attention that was kept of layer {stamp.layer_number} was changed in place, or its memory freed; "
                "use its output without changing it, or leave out --cp-keep-attention (kept=None)."
            )
        _go_on(stamp, device, call)
        return call

    def _begin(self) -> None:
        if self._phase != "new":
            raise ValueError("a KeptAttention belongs to one checkpoint; make a new one for every call of checkpoint.")
        self._phase = "keeping"

    def _end(self, failed: bool) -> None:
        self._phase = "kept"

    def _begin_again(self) -> None:
        if self._phase == "spent":
            warn_rank0("a second backward pass recomputes a checkpoint: kept attention was released and runs again.")
        else:
            self._phase = "taking"

    def _end_again(self, failed: bool) -> None:
        left, self._phase = len(self._calls), "spent"
        self._calls.clear()
        if left and not failed:  # torch ends a recomputation by an exception once it has all it needs
            raise ValueError(f"recomputation left out {left} calls of attention of the first pass; {WAY_OUT}")


@dataclass(frozen=True)
class _Pass(AbstractContextManager[None]):
    begin: Callable[[], None]
    end: Callable[[bool], None]

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(kind is not None)


def _fingerprint(computed: Computed) -> list[tuple[int, int]]:
    """Changes with every in-place change, and if the memory of a tensor is freed, as Megatron does."""
    return [(_version(tensor), tensor.untyped_storage().nbytes()) for tensor in computed.tensors]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have no version


def _generators(stamp: Stamp, device: torch.device) -> list[torch.Generator]:
    """The random generators that attention's dropout may use."""
    devices = {torch.device("cpu"): None, device: None} if stamp.dropout_p else {}
    return [default_generator(each) for each in devices]


def _random_states(stamp: Stamp, device: torch.device) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(stamp, device)]


def _go_on(stamp: Stamp, device: torch.device, call: _KeptCall) -> None:
    """Set the generators to their states after the first pass, if their states before it agree."""
    for generator, before, after in zip(_generators(stamp, device), call.random_before, call.random_after):
        if not torch.equal(generator.get_state(), before):
            raise ValueError(
                f"recomputation draws other random numbers than the first pass (dropout of layer {stamp.layer_number}, "
                f"{generator.device.type}); checkpoint with preserve_rng_state=True."
            )
        generator.set_state(after)
