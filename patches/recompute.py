"""Patches of recomputation: it must see the micro-batch of its forward pass, and may take its attention from there."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import wraps
from itertools import chain, repeat
from typing import Any

import torch
from mindspeed_cp.patches.manager import Patch

from mindspeed_cp.attention.kept import KeptAttention

RANDOM = "megatron.core.tensor_parallel.random"


def recompute_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{RANDOM}.checkpoint",
            _checkpoint(state),
            "recomputation must see the micro-batch of its forward pass; --cp-keep-attention",
        ),
        Patch(
            f"{RANDOM}.CheckpointWithoutOutput.checkpoint",
            _checkpoint_without_output(state),
            "recomputation must see the micro-batch of its forward pass",
        ),
    ]


def _checkpoint(state):
    def build(original):
        @wraps(original)
        def checkpoint(function, *args, **kwargs):
            if state.alone:
                return original(function, *args, **kwargs)
            return original(state.bound(_with_attention_kept(state, function, args)), *args, **kwargs)

        return checkpoint

    return build


def _with_attention_kept(state, function: Callable, inputs: Iterable[Any]) -> Callable:
    """``function`` for one checkpoint that calls it once in the forward pass and again in the backward pass.

    That comes when a graph is made and an input leads to it; otherwise, as in an evaluation, nothing is kept.
    """
    comes_back = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    if not (state.config.keep_attention and comes_back):
        return function
    kept = KeptAttention(outer=state.kept)
    first, later = kept.contexts()
    passes = chain([first], repeat(later))

    @wraps(function)
    def call(*args, **kwargs):
        with next(passes), _running_with(state, kept):
            return function(*args, **kwargs)

    return call


@contextmanager
def _running_with(state, kept):
    before, state.kept = state.kept, kept
    try:
        yield
    finally:
        state.kept = before


def _checkpoint_without_output(state):
    def build(original):
        @wraps(original)
        def checkpoint(self, run_function, *args, **kwargs):
            # It gives back the memory of what it returns, so that nothing of it can be kept.
            return original(self, run_function if state.alone else state.bound(run_function), *args, **kwargs)

        return checkpoint

    return build
