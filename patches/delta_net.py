"""Patches of gated delta nets, which see earlier tokens through a recurrent state.

Megatron has them from 0.16 on; until 0.17 it treats a rank's part as the whole sequence, and from 0.18 on it splits
heads over the ranks, for a zigzag over the whole row or over every document. Here they are computed for any layout and
any documents, by heads or by states (--cp-linear-exchange).
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_cp.megatron import hidden_exchange
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import packed_params_in, refuse_inference
from mindspeed_cp.megatron.linear_layers import DELTA_NET, gated_delta_net
from mindspeed_cp.patches.rows import absent, patch

LAYER = f"{DELTA_NET}.GatedDeltaNet"
LAYOUT = "the batch may have another layout than Megatron's zigzag over the whole row"
ABSENT = "this version has no gated delta nets"
WITHOUT = "this version's gated delta nets have no context parallelism"


def takes_comm_type() -> str:
    """Why the constructor needs no patch: from 0.19 on it accepts and ignores cp_comm_type; else ""."""
    layer = importlib.import_module(DELTA_NET).GatedDeltaNet
    return "it takes cp_comm_type" if "cp_comm_type" in inspect.signature(layer.__init__).parameters else ""


@patch(
    f"{LAYER}.__init__",
    reason="layers of a model with context parallelism are built with its cp_comm_type, which is attention's alone",
    when=(absent(LAYER, ABSENT), takes_comm_type),
)
def __init__(adaptor: Adaptor, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    kwargs.pop("cp_comm_type", None)
    original(self, *args, **kwargs)


@patch(
    f"{LAYER}.forward",
    reason="a rank's part of the sequence has any layout, and its states begin where the ranks before it end",
    when=absent(LAYER, ABSENT),
)
def forward(
    adaptor: Adaptor,
    original: Callable[..., Any],
    self: Any,
    hidden_states: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    scope = adaptor.scope_of(self)
    if scope.alone:
        return original(self, hidden_states, *args, **kwargs)
    values = (*args, *kwargs.values())
    refuse_inference(values)
    return gated_delta_net(adaptor, scope, self, hidden_states, packed_params_in(values))


@patch(f"{DELTA_NET}.tensor_a2a_cp2hp", reason=LAYOUT, when=absent(f"{DELTA_NET}.tensor_a2a_cp2hp", WITHOUT))
def tensor_a2a_cp2hp(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    return hidden_exchange.tensor_a2a_cp2hp(adaptor, *args, **kwargs)


@patch(f"{DELTA_NET}.tensor_a2a_hp2cp", reason=LAYOUT, when=absent(f"{DELTA_NET}.tensor_a2a_hp2cp", WITHOUT))
def tensor_a2a_hp2cp(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    return hidden_exchange.tensor_a2a_hp2cp(adaptor, *args, **kwargs)
