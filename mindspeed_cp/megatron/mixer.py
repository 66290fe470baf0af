"""Megatron's Mamba mixers by states: their projections, kernels and weights around mindspeed_cp.linear.state_space.

s: tokens of this rank, b: batch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mindspeed_cp.linear.parts import OwnPart
from mindspeed_cp.linear.state_space import StateSpace, StateSpaceLayer
from mindspeed_cp.megatron.batches import block_record
from mindspeed_cp.megatron.moving import Inner, by_parts, dao_convolution, documents_of, torch_convolution
from mindspeed_cp.megatron.scopes import Scope

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

MODULE = "megatron.core.ssm.mamba_mixer"


def computed(adaptor: "Adaptor", scope: Scope, mixer: Any, hidden: torch.Tensor, params: Any) -> tuple[Any, Any]:
    """The layer's output for this rank's tokens, and the bias of its last projection.

    Args:
        mixer: a MambaMixer. hidden: (s, b, hidden), s divided by sequence parallelism.
        params: PackedSeqParams in thd, None for whole sequences.
    """
    record = block_record(adaptor, scope, mixer.config, hidden.size(0), params)
    layer, documents = layer_of(mixer), documents_of(adaptor, params, record.seq_len)
    inner, heads = mixer.d_inner_local_tp, mixer.nheads_local_tp
    widths = inner, inner + 2 * mixer.ngroups_local_tp * mixer.d_state, heads

    def by_state(projected: torch.Tensor, part: OwnPart) -> Inner:
        gate, inputs, steps = projected.split(widths, dim=-1)
        out = layer.by_state(inputs, steps, part)
        gated = (out.float() * F.silu(gate.float())).to(out.dtype)  # norm_before_gate is off in every version
        return Inner(mixer.norm(gated) if mixer.rmsnorm else gated)

    return by_parts(adaptor, record, documents, mixer, hidden, by_state)


def layer_of(mixer: Any) -> StateSpaceLayer:
    """The core of a MambaMixer, with the heads of this tensor-parallel rank."""
    names, exchange = import_module(MODULE), mixer.cp
    weight, bias = _convolution_of(exchange)
    skip = exchange.D_cp1.float()
    scan = StateSpace(
        names.mamba_chunk_scan_combined,
        -torch.exp(exchange.A_log_cp1.float()),
        skip.unflatten(0, (-1, mixer.headdim)) if exchange.D_has_hdim else skip,
        exchange.dt_bias_cp1.float(),
        mixer.chunk_size,
        torch.float32,
    )
    dao = names.causal_conv1d_fn
    convolve = torch_convolution(mixer.act) if dao is None else dao_convolution(dao, mixer.activation)
    return StateSpaceLayer(scan, mixer.ngroups_local_tp, mixer.d_state, weight.squeeze(1), bias, convolve)


def _convolution_of(exchange: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the convolution; up to 0.18 the exchange has them in a module."""
    module = getattr(exchange, "conv1d_cp1", None)
    if module is None:
        return exchange.conv1d_weight_cp1, exchange.conv1d_bias_cp1
    return module.weight, module.bias
