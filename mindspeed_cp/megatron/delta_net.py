"""Megatron's gated delta nets: their projections, kernels and weights, with the exchanges of mindspeed_cp.linear.

The kernels are those that Megatron has chosen: flash-linear-attention's, or torch's in deterministic mode.
s: tokens of this rank, b: batch.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_cp.linear.gated_delta import DeltaHeads, DeltaLayer, DeltaWeights
from mindspeed_cp.linear.parts import OwnPart
from mindspeed_cp.linear.recurrence import Convolution, DeltaRule, Documents, boundaries_on
from mindspeed_cp.megatron.batches import block_record
from mindspeed_cp.megatron.hidden_exchange import exchange_of
from mindspeed_cp.megatron.moving import Inner, by_parts, dao_convolution, documents_of, through, torch_convolution
from mindspeed_cp.megatron.scopes import Scope

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

MODULE = "megatron.core.ssm.gated_delta_net"


def computed(adaptor: "Adaptor", scope: Scope, module: Any, hidden: torch.Tensor, params: Any) -> tuple[Any, Any]:
    """The layer's output for this rank's tokens, and the bias of its last projection.

    Args:
        module: a GatedDeltaNet. hidden: (s, b, hidden), s divided by sequence parallelism.
        params: PackedSeqParams in thd, None for whole sequences.

    Raises:
        ValueError: heads are to be split, but there are fewer heads than ranks.
    """
    record = block_record(adaptor, scope, module.config, hidden.size(0), params)
    layer, documents = layer_of(module), documents_of(adaptor, params, record.seq_len)
    if scope.config.linear_exchange == "heads":
        _check_heads(layer.heads, scope.size)
        exchange = exchange_of(scope, record.layout)

        def by_heads(projected: torch.Tensor) -> Inner:
            inputs, gate, gates = _split(module, projected)
            return _gated(module, layer.by_heads(inputs, gates, exchange, documents), gate)

        return through(module, hidden, by_heads)

    def by_state(projected: torch.Tensor, part: OwnPart) -> Inner:
        inputs, gate, gates = _split(module, projected)
        return _gated(module, layer.by_state(inputs, gates, part), gate)

    return by_parts(adaptor, record, documents, module, hidden, by_state)


def layer_of(module: Any) -> DeltaLayer:
    """The core of a GatedDeltaNet, with the heads of this tensor-parallel rank."""
    names, config, tp = import_module(MODULE), module.config, module.tp_size
    rule = getattr(module, "gated_delta_rule", None)  # from 0.18 on
    if rule is None:
        rule = names.torch_chunk_gated_delta_rule if config.deterministic_mode else names.chunk_gated_delta_rule
    return DeltaLayer(
        DeltaHeads(
            module.num_key_heads // tp, module.num_value_heads // tp, module.key_head_dim, module.value_head_dim
        ),
        DeltaWeights(module.conv1d.weight.squeeze(1), module.conv1d.bias, module.A_log, module.dt_bias),
        DeltaRule(rule, not config.deterministic_mode, torch.float32),
        _convolution(module, names),
        names.l2norm if module.use_qk_l2norm else None,
    )


def _split(module: Any, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(s, b, width) -> inputs of the convolution (s, b, channels), gate of the output (s, b, v), beta and alpha."""
    tp = module.tp_size
    widths = (2 * module.qk_dim + module.v_dim) // tp, module.v_dim // tp, 2 * module.num_value_heads // tp
    return tuple(projected.split(widths, dim=-1))


def _gated(module: Any, core: torch.Tensor, gate: torch.Tensor) -> Inner:
    """(s, b, value heads, value_dim) and (s, b, v) -> (s, b, v), normalized and gated."""
    if not getattr(module, "recompute_norm_out", False):
        return Inner(_norm(module, core, gate))
    from megatron.core.tensor_parallel import CheckpointWithoutOutput

    kept = CheckpointWithoutOutput(fp8=module.config.fp8)  # its default value needs Transformer Engine
    return Inner(kept.checkpoint(partial(_norm, module), core, gate), kept.discard_output_and_register_recompute)


def _norm(module: Any, core: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    gate = gate.unflatten(-1, core.shape[2:])
    normed: torch.Tensor = module._apply_gated_norm(core.contiguous(), gate.contiguous())
    return normed.reshape(*core.shape[:2], -1)


def _check_heads(heads: DeltaHeads, ranks: int) -> None:
    if heads.values < ranks:
        raise ValueError(
            f"--cp-linear-exchange heads needs a value head of gated delta nets for each of the {ranks} "
            f"context-parallel ranks, and a tensor-parallel rank has {heads.values} (--linear-num-value-heads); use "
            "--cp-linear-exchange state."
        )


def _convolution(module: Any, names: Any) -> Convolution:
    """The convolution that Megatron would run for this layer."""
    fla, dao = getattr(names, "causal_conv1d", None), getattr(names, "causal_conv1d_fn", None)
    if module.config.deterministic_mode or (fla is None and dao is None):
        return torch_convolution(module.act_fn)
    return dao_convolution(dao, module.activation) if fla is None else partial(_by_fla, fla, module.activation)


def _by_fla(
    function: Any,
    activation: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: Documents,
) -> torch.Tensor:
    ends = boundaries_on(documents, rows.device) if len(documents) > 2 else None
    mixed: torch.Tensor = function(x=rows, weight=weight, bias=bias, activation=activation, cu_seqlens=ends)[0]
    return mixed
