"""Patches of state-space layers, which see the whole sequence and put it in order for that themselves.

Megatron gathers the sequence from all ranks for a part of the heads, undoes the zigzag over the whole row that it takes
every batch to have, runs the layer, and redoes it. Here it is the layout of the batch that is undone and redone.
s: tokens of this rank, S: of the whole sequence.
"""

from collections.abc import Callable
from typing import Any

import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import record_of_length
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.patches.computing import computes_over, computing_over
from mindspeed_cp.patches.rows import absent, patch
from mindspeed_cp.sequence.layout import SequenceLayout

CONTEXT_PARALLEL = "megatron.core.ssm.mamba_context_parallel"
MIXER = f"{CONTEXT_PARALLEL}.MambaContextParallel"
WITHOUT = absent(MIXER, "this version's Mamba has no context parallelism")
ORDER = "the batch may have another layout than Megatron's zigzag over the whole row"


@patch(
    f"{MIXER}.pre_conv_ssm", reason="Megatron's all-to-all of state-space layers takes equal lengths only", when=WITHOUT
)
def pre_conv_ssm(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    scope = adaptor.scopes.of(self.cp_group)
    if not scope.alone:
        _refuse_uneven(record_of_length(adaptor, scope, input_.size(0)).layout)
    with computing_over(scope):
        return original(self, input_, *args, **kwargs)


@patch(f"{MIXER}.post_conv_ssm", reason="the order of the batch is that of the layer's own group", when=WITHOUT)
def post_conv_ssm(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    with computing_over(adaptor.scopes.of(self.cp_group)):
        return original(self, *args, **kwargs)


@patch(f"{CONTEXT_PARALLEL}._undo_attention_load_balancing", reason=ORDER, when=WITHOUT)
def undo_attention_load_balancing(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    input_: torch.Tensor,
    cp_size: int,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """(S, b, h), rank after rank -> the same in the order of the sequence."""
    scope = computes_over()
    if scope is None or scope.alone:
        return original(input_, cp_size, *args, **kwargs)
    return _layout(adaptor, scope, input_).unshard(input_.chunk(cp_size))


@patch(f"{CONTEXT_PARALLEL}._redo_attention_load_balancing", reason=ORDER, when=WITHOUT)
def redo_attention_load_balancing(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    input_: torch.Tensor,
    cp_size: int,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """(S, b, h) in the order of the sequence -> the same, rank after rank."""
    scope = computes_over()
    if scope is None or scope.alone:
        return original(input_, cp_size, *args, **kwargs)
    layout = _layout(adaptor, scope, input_)
    return torch.cat([layout.shard(input_, rank) for rank in range(cp_size)])


def _layout(adaptor: Adaptor, scope: Scope, whole: torch.Tensor) -> SequenceLayout:
    return record_of_length(adaptor, scope, whole.size(0) // scope.size).layout


def _refuse_uneven(layout: SequenceLayout) -> None:
    if not layout.is_even:
        raise ValueError(
            f"state-space layers need equally many tokens on every rank, and a sequence of {layout.seq_len} tokens in "
            f"the layout {layout.kind} is shared unevenly by the --context-parallel-size {layout.cp_size} ranks; use a "
            f"length that 2 x {layout.cp_size} divides."
        )
