"""Patches of recomputation: it must see the micro-batch of its forward pass, and may reuse that pass's attention."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain, repeat
from typing import Any

import torch

from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.patches.attention import WITHOUT_TE
from mindspeed_cp.patches.rows import absent, patch

TE = "megatron.core.extensions.transformer_engine"
RANDOM = "megatron.core.tensor_parallel.random"
Function = Callable[..., Any]


@patch(
    f"{RANDOM}.checkpoint",
    reason="recomputation must see the micro-batch of its forward pass, and --cp-keep-attention",
)
def checkpoint(adaptor: Adaptor, original: Function, function: Function, *args: Any, **kwargs: Any) -> Any:
    if adaptor.alone:
        return original(function, *args, **kwargs)
    return original(adaptor.bound(_with_attention_kept(adaptor, function, args)), *args, **kwargs)


def _with_attention_kept(adaptor: Adaptor, function: Function, inputs: Iterable[Any]) -> Function:
    """Wrap ``function`` for a checkpoint that calls it once in the forward pass and again in the backward pass.

    There is a backward pass only if gradients are enabled and an input requires one; otherwise, as in an evaluation,
    nothing is kept.
    """
    config = adaptor.config
    comes_back = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    if config is None or not (config.keep_attention and comes_back):
        return function
    kept = KeptAttention(outer=adaptor.kept)
    first, later = kept.contexts()
    passes = chain([first], repeat(later))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with next(passes), _running_with(adaptor, kept):
            return function(*args, **kwargs)

    return call


@contextmanager
def _running_with(adaptor: Adaptor, kept: KeptAttention) -> Iterator[None]:
    before, adaptor.kept = adaptor.kept, kept
    try:
        yield
    finally:
        adaptor.kept = before


@patch(
    "torch.utils.checkpoint.checkpoint",
    reason="scripts and frameworks recompute with torch's own checkpoint, which must see the same micro-batch",
    essential=False,
)
def torch_checkpoint(adaptor: Adaptor, original: Function, function: Function, *args: Any, **kwargs: Any) -> Any:
    return original(function if adaptor.alone else adaptor.bound(function), *args, **kwargs)


@patch(
    f"{TE}.te_checkpoint",
    reason="layers in fp8 are recomputed by Transformer Engine, which must see the same micro-batch",
    when=(WITHOUT_TE, absent(f"{TE}.te_checkpoint", "this version does not recompute with Transformer Engine")),
)
def te_checkpoint(adaptor: Adaptor, original: Function, forward_func: Function, *args: Any, **kwargs: Any) -> Any:
    return original(forward_func if adaptor.alone else adaptor.bound(forward_func), *args, **kwargs)


@patch(
    f"{RANDOM}.CheckpointWithoutOutput.checkpoint",
    reason="recomputation must see the micro-batch of its forward pass",
)
def checkpoint_without_output(
    adaptor: Adaptor, original: Function, self: Any, run_function: Function, *args: Any, **kwargs: Any
) -> Any:
    # It frees the memory of its output, so nothing of it can be kept.
    return original(self, run_function if adaptor.alone else adaptor.bound(run_function), *args, **kwargs)
