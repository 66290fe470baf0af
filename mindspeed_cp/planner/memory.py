"""Memory of one attention layer, counted on the meta tensors that the engine itself makes."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.kernels.base import BlockResult, MemoryOrder
from mindspeed_cp.kernels.merge import merge_attention
from mindspeed_cp.planner.events import Notes
from mindspeed_cp.planner.trace import DEVICES, NotingKernel, Problem, dry_call
from mindspeed_cp.settings.config import ContextParallelConfig


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an operator's arguments or results (nested lists, tuples and dicts)."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages of floating tensors made inside, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), False)  # tensors from outside do not count, nor do their views
        result = func(*args, **(kwargs or {}))
        self._note(result, True)
        return result

    def _note(self, values: Any, made: bool) -> None:
        for tensor in _tensors(values):
            if made and not tensor.is_floating_point():
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if storage.nbytes() and key not in self._known:
                self._sizes[key] = storage.nbytes() * made
                self._known[key] = weakref.ref(storage, partial(self._forget, key))
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)

    def _forget(self, key: int, _: Any) -> None:
        del self._known[key]
        self.now -= self._sizes.pop(key)

    def most_during(self, function: Callable[[], None]) -> int:
        """Return the peak of live bytes during the call, minus those before it."""
        before, peak = self.now, self.peak
        self.peak = before
        function()
        most, self.peak = self.peak - before, max(peak, self.peak)
        return most

    def add_for_a_moment(self, num_bytes: int) -> None:
        self.peak = max(self.peak, self.now + num_bytes)


@dataclass
class WeighingKernel(NotingKernel):
    """Merging is slow on meta tensors: run it once for each shape, and then only count the bytes that it held."""

    live: LiveBytes = field(default_factory=LiveBytes)
    _held: dict[Any, int] = field(default_factory=dict)

    def merge(self, out: torch.Tensor, lse: torch.Tensor, statistics: Any, block: BlockResult) -> Any:
        shapes = out.shape, out.dtype, block.out.dtype
        if shapes not in self._held:
            self._held[shapes] = self.live.most_during(lambda: merge_attention(out, lse, block.out, block.lse))
        self.live.add_for_a_moment(self._held[shapes])


class Rest(torch.autograd.Function):
    """The rest of a layer after attention: it saves nothing of out, and returns a gradient of the same size."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        ctx.shape = out.shape
        return out.new_empty(0)

    @staticmethod
    def backward(ctx: Any, nothing: torch.Tensor) -> torch.Tensor:
        return nothing.new_empty(ctx.shape)


def layer(call: Callable[..., torch.Tensor], *tensors: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Run a layer that computes query, key and value, calls attention, and continues with ``Rest``."""
    inputs = [tensor.clone() for tensor in tensors]
    after: torch.Tensor = Rest.apply(call(*inputs, **keywords))
    return after


@dataclass(frozen=True)
class AttentionBytes:
    """One attention layer of one rank; every storage counts once.

    Args:
        saved: bytes kept from the forward to the backward pass: query, key, value, out, statistics, engine's additions.
        passing: peak in addition to that in either pass: blocks, sums, gradients (including that of out), and in the
            forward pass the query, key and value of which the engine saves copies.
        buffers: reused memory, which all layers share.
    """

    saved: int
    passing: int
    buffers: int


def attention_bytes(
    config: ContextParallelConfig,
    problem: Problem,
    rank: int,
    order: MemoryOrder | None = None,
    backend: str = DEVICES,
) -> AttentionBytes:
    """Bytes that cp_rank ``rank`` holds for attention in one layer, without projections and other parts of the layer,
    and without a kernel's internal memory.

    Args:
        order: memory order of the kernel, which decides which tensors share memory.
        backend: back end of the transfers; gloo's all-to-all of the mesh exchange consists of single messages.
    """
    kernel = WeighingKernel(Notes(), order)
    call, buffers = dry_call(config, problem, rank, kernel, backend), -1
    end = layer(call, *call.leaves)  # the first run, which allocates the reused buffers, is not counted
    end.backward(end)
    while buffers != call.groups.workspace.num_bytes:
        buffers, kernel.live = call.groups.workspace.num_bytes, LiveBytes()
        saved = _Saved()
        with kernel.live, saved:
            end = layer(call, *call.leaves)
            end.backward(end)
    num_bytes = sum(saved.sizes.values())
    return AttentionBytes(num_bytes, kernel.live.peak - num_bytes, buffers)


@lru_cache(maxsize=4096)
def most_bytes(config: ContextParallelConfig, problem: Problem) -> AttentionBytes:
    """``attention_bytes`` of the first or the last rank, the larger in every count."""
    counts = [astuple(attention_bytes(config, problem, rank)) for rank in {0, config.context_parallel_size - 1}]
    return AttentionBytes(*map(max, zip(*counts)))


@lru_cache(maxsize=4096)
def kept_bytes(config: ContextParallelConfig, problem: Problem, rank: int, order: MemoryOrder | None = None) -> int:
    """Bytes that cp_rank ``rank`` keeps per layer from forward to recomputation with ``--cp-keep-attention``."""
    kept = KeptAttention()
    first, _ = kept.contexts()
    with first, torch.no_grad():
        call = dry_call(config, problem, rank, NotingKernel(Notes(), order))
        call(*call.leaves, kept=kept)
    return kept.num_bytes


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Record what is saved for backward inside: storage -> bytes."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        super().__init__(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):  # weights are counted with the layer's
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor
