"""Patches of state-space layers, which gather the whole sequence and order it themselves.

Megatron gathers the sequence from all ranks for a part of the heads, undoes the zigzag over the whole row that it
assumes for every batch, runs the layer, and redoes the zigzag. Here heads travel in one message, and the layout is the
batch's. s: tokens of this rank, S: tokens of the whole sequence, b: batch.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_cp.attention.head_groups import head_shares
from mindspeed_cp.comm.head_exchange import HeadExchange
from mindspeed_cp.comm.sequence_exchange import Part
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import packed_params_in, record_of_length, refuse_inference
from mindspeed_cp.megatron.hidden_exchange import exchange_of, layout_of_rows
from mindspeed_cp.megatron.linear_layers import MAMBA_MIXER, mamba_mixer
from mindspeed_cp.patches.rows import Row, absent, patch
from mindspeed_cp.sequence.layout import SequenceLayout

CONTEXT_PARALLEL = "megatron.core.ssm.mamba_context_parallel"
MIXER = f"{CONTEXT_PARALLEL}.MambaContextParallel"
WITHOUT = absent(MIXER, "this version's Mamba has no context parallelism")
LAYER = f"{MAMBA_MIXER}.MambaMixer"
ORDER = "the batch may have another layout than Megatron's zigzag over the whole row"
FRAMEWORKS = f"layers of frameworks call it, and {ORDER}"


def no_mixer() -> str:
    """Why there is no mixer to patch: it requires mamba-ssm and, in most versions, Triton; else ""."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed"
    try:
        importlib.import_module(MAMBA_MIXER)
    except Exception as error:  # compiled libraries may raise anything
        return f"Mamba's mixer cannot be imported here: {error}"
    return ""


@patch(
    f"{LAYER}.forward",
    reason="with --cp-linear-exchange state, states go from rank to rank instead",
    when=(WITHOUT, no_mixer),
)
def forward(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    scope = adaptor.scope_of(self)
    if scope.alone or scope.config.linear_exchange == "heads":
        return original(self, hidden_states, *args, **kwargs)
    values = (*args, *kwargs.values())
    refuse_inference(values)
    return mamba_mixer(adaptor, scope, self, hidden_states, packed_params_in(values))


@patch(f"{MIXER}.pre_conv_ssm", reason=ORDER, when=WITHOUT)
def pre_conv_ssm(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """(s, b, z x B C dt of all heads) -> (S, b, those of this rank's heads), in sequence order."""
    scope = adaptor.scopes.of(self.cp_group)
    if scope.alone:
        return original(self, input_, *args, **kwargs)
    layout, parts = record_of_length(adaptor, scope, input_.size(0)).layout, _parts(self)
    pieces = input_.split([part.num_heads * part.dim for part in parts], dim=-1)
    heads = (piece.unflatten(-1, (part.num_heads, part.dim)) for piece, part in zip(pieces, parts))
    exchange = HeadExchange(exchange_of(scope, layout), parts)
    return torch.cat([piece.flatten(2) for piece in exchange.to_sequence(*heads)], dim=-1)


@patch(f"{MIXER}.post_conv_ssm", reason=ORDER, when=WITHOUT)
def post_conv_ssm(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """(S, b, x of this rank's heads) -> (s, b, x of all heads)."""
    scope = adaptor.scopes.of(self.cp_group)
    if scope.alone:
        return original(self, input_, *args, **kwargs)
    layout, part = layout_of_rows(adaptor, scope, input_.size(0), None), _parts(self)[0]
    heads = input_.unflatten(-1, (part.count(scope.rank), part.dim))
    return HeadExchange(exchange_of(scope, layout), [part]).to_heads(heads)[0].flatten(2)


def _parts(layer: Any) -> list[Part]:
    """z, x, B, C and dt of a MambaContextParallel; a group of B and C goes to every rank that has heads in it."""
    heads, groups = layer.nheads_local_tp, layer.ngroups_local_tp
    shares, of_groups = head_shares(heads, groups, layer.cp_size)
    inner = Part("heads", heads, layer.d_inner_local_tp // heads, shares)
    group = Part("groups", groups, layer.d_state, of_groups)
    return [inner, inner, group, group, Part("heads", heads, 1, shares)]


def _load_balancing(name: str, reorder: Callable[[SequenceLayout, torch.Tensor], torch.Tensor]) -> Row:
    """A patch of a function that reorders (S, b, h), without a group: by the layout of the running model.

    Outside of models it keeps Megatron's layout.
    """

    @patch(f"{CONTEXT_PARALLEL}.{name}", reason=FRAMEWORKS, when=WITHOUT)
    def reordered(
        adaptor: Adaptor,
        original: Callable[..., torch.Tensor],
        input_: torch.Tensor,
        cp_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        scope = adaptor.current
        if adaptor.active is None or scope.size != cp_size:
            return original(input_, cp_size, *args, **kwargs)
        return reorder(layout_of_rows(adaptor, scope, input_.size(0), None), input_)

    return reordered


def _to_sequence_order(layout: SequenceLayout, whole: torch.Tensor) -> torch.Tensor:
    return layout.unshard(whole.split([layout.length(rank) for rank in range(layout.cp_size)]))


def _to_rank_order(layout: SequenceLayout, whole: torch.Tensor) -> torch.Tensor:
    return torch.cat([layout.shard(whole, rank) for rank in range(layout.cp_size)])


undo_attention_load_balancing = _load_balancing("_undo_attention_load_balancing", _to_sequence_order)
redo_attention_load_balancing = _load_balancing("_redo_attention_load_balancing", _to_rank_order)
