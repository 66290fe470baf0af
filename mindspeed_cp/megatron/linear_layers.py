"""Megatron's gated delta nets and Mamba mixers: their projections, kernels and weights around mindspeed_cp.linear.

The kernels are those that Megatron has chosen: flash-linear-attention's and mamba-ssm's, or torch's. Layers by states
need one contiguous part of the sequence on each rank, whatever the layout of the batch.
s: tokens of this rank, b: batch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from mindspeed_cp.linear.gated_delta import DeltaHeads, DeltaLayer, DeltaWeights
from mindspeed_cp.linear.parts import OwnPart
from mindspeed_cp.linear.recurrence import Convolution, DeltaRule, Documents, boundaries_on, causal_convolution
from mindspeed_cp.linear.rows import contiguous_parts, conversion, exchange_rows
from mindspeed_cp.linear.state_space import StateSpace, StateSpaceLayer
from mindspeed_cp.megatron.batches import block_record
from mindspeed_cp.megatron.hidden_exchange import exchange_of
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import Scope

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

DELTA_NET = "megatron.core.ssm.gated_delta_net"
MAMBA_MIXER = "megatron.core.ssm.mamba_mixer"

Rows = Callable[[torch.Tensor], torch.Tensor]


class Inner(NamedTuple):
    """The result of a layer's computation between its projections.

    Args:
        rows: (s, b, width), input of the last projection.
        done: called with the output of the last projection.
    """

    rows: torch.Tensor
    done: Callable[[torch.Tensor], None] = lambda out: None


class Move(NamedTuple):
    """The exchanges of rows to the layout that a layer needs, and back."""

    there: Rows
    back: Rows


STAY = Move(lambda rows: rows, lambda rows: rows)


def _through(
    module: Any,
    hidden: torch.Tensor,
    compute: Callable[[torch.Tensor], Inner],
    around: Move = STAY,
    inside: Move = STAY,
) -> tuple[Any, Any]:
    """Run a layer with ``in_proj`` and ``out_proj``, moving its rows outside of its projections or between them.

    Returns:
        its output and the bias of its last projection.
    """
    inner = compute(inside.there(module.in_proj(around.there(hidden))[0]))
    out, bias = module.out_proj(inside.back(inner.rows))
    inner.done(out)
    return around.back(out), bias


def _by_parts(
    adaptor: "Adaptor",
    record: MicroBatch,
    documents: Documents,
    module: Any,
    hidden: torch.Tensor,
    compute: Callable[[torch.Tensor, OwnPart], Inner],
) -> tuple[Any, Any]:
    """Run ``_through`` for a layer that computes one part of the sequence on each rank; ``compute`` gets that part."""
    assert record.scope is not None and record.scope.groups.cp is not None, "one rank uses Megatron's own function"
    layout, link = record.layout, record.scope.groups.cp
    parts = contiguous_parts(layout)
    plans = conversion(layout, parts), conversion(parts, layout)
    move = Move(*(partial(exchange_rows, plan=plan, link=link, purpose="tokens") for plan in plans))
    part = OwnPart(link, parts, documents)

    def computed(projected: torch.Tensor) -> Inner:
        return compute(projected, part)

    if module.config.sequence_parallel:  # whose rows are gathered by the first projection
        return _through(module, hidden, computed, inside=move)
    with adaptor.running(replace(record, layout=parts, moved_from=layout)):
        return _through(module, hidden, computed, around=move)


def _documents_of(adaptor: "Adaptor", params: Any, seq_len: int) -> Documents:
    """Boundaries at which a state restarts: those of packed documents, padding included, as in Megatron.

    Args:
        params: PackedSeqParams in thd, None for whole sequences.
    """
    if params is None:
        return 0, seq_len
    ends: Documents = adaptor.boundaries.padded(params)
    return ends if ends[-1] == seq_len else (*ends, seq_len)  # the rest is a separate document


def _convolution(activate: Rows, activation: str, dao: Any) -> Convolution:
    """Torch's convolution, or that of the package causal-conv1d, document by document.

    Args:
        activate: the activation that torch's is followed by. activation: its name for the package.
        dao: the package's function, or None.
    """
    if dao is None:
        return lambda *arguments: activate(causal_convolution(*arguments))

    def convolve(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: Documents
    ) -> torch.Tensor:
        found = [
            dao(x=rows[:, low:high].transpose(1, 2).contiguous(), weight=weight, bias=bias, activation=activation)
            for low, high in zip(documents, documents[1:])
        ]
        return torch.cat(found, dim=-1).transpose(1, 2)

    return convolve


def gated_delta_net(
    adaptor: "Adaptor", scope: Scope, module: Any, hidden: torch.Tensor, params: Any
) -> tuple[Any, Any]:
    """The layer's output for this rank's tokens, and the bias of its last projection.

    Args:
        module: a GatedDeltaNet. hidden: (s, b, hidden), s divided by sequence parallelism.
        params: PackedSeqParams in thd, None for whole sequences.

    Raises:
        ValueError: heads are to be split, but there are fewer heads than ranks.
    """
    record = block_record(adaptor, scope, module.config, hidden.size(0), params)
    layer, documents = delta_layer(module), _documents_of(adaptor, params, record.seq_len)
    if scope.config.linear_exchange == "heads":
        _check_heads(layer.heads, scope.size)
        exchange = exchange_of(scope, record.layout)

        def by_heads(projected: torch.Tensor) -> Inner:
            inputs, gate, gates = _split(module, projected)
            return _gated(module, layer.by_heads(inputs, gates, exchange, documents), gate)

        return _through(module, hidden, by_heads)

    def by_state(projected: torch.Tensor, part: OwnPart) -> Inner:
        inputs, gate, gates = _split(module, projected)
        return _gated(module, layer.by_state(inputs, gates, part), gate)

    return _by_parts(adaptor, record, documents, module, hidden, by_state)


def delta_layer(module: Any) -> DeltaLayer:
    """The core of a GatedDeltaNet, with the heads of this tensor-parallel rank."""
    names, config, tp = import_module(DELTA_NET), module.config, module.tp_size
    rule = getattr(module, "gated_delta_rule", None)  # from 0.18 on
    if rule is None:
        rule = names.torch_chunk_gated_delta_rule if config.deterministic_mode else names.chunk_gated_delta_rule
    return DeltaLayer(
        DeltaHeads(
            module.num_key_heads // tp, module.num_value_heads // tp, module.key_head_dim, module.value_head_dim
        ),
        DeltaWeights(module.conv1d.weight.squeeze(1), module.conv1d.bias, module.A_log, module.dt_bias),
        DeltaRule(rule, not config.deterministic_mode, torch.float32),
        _delta_convolution(module, names),
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


def _delta_convolution(module: Any, names: Any) -> Convolution:
    """The convolution that Megatron would run for this layer."""
    fla, dao = getattr(names, "causal_conv1d", None), getattr(names, "causal_conv1d_fn", None)
    if module.config.deterministic_mode:
        fla = dao = None
    if fla is None:
        return _convolution(module.act_fn, module.activation, dao)
    return partial(_by_fla, fla, module.activation)


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


def mamba_mixer(adaptor: "Adaptor", scope: Scope, mixer: Any, hidden: torch.Tensor, params: Any) -> tuple[Any, Any]:
    """The layer's output for this rank's tokens, and the bias of its last projection.

    Args:
        mixer: a MambaMixer. hidden: (s, b, hidden), s divided by sequence parallelism.
        params: PackedSeqParams in thd, None for whole sequences.
    """
    record = block_record(adaptor, scope, mixer.config, hidden.size(0), params)
    layer, documents = state_space_layer(mixer), _documents_of(adaptor, params, record.seq_len)
    inner, heads = mixer.d_inner_local_tp, mixer.nheads_local_tp
    widths = inner, inner + 2 * mixer.ngroups_local_tp * mixer.d_state, heads

    def by_state(projected: torch.Tensor, part: OwnPart) -> Inner:
        gate, inputs, steps = projected.split(widths, dim=-1)
        out = layer.by_state(inputs, steps, part)
        gated = (out.float() * F.silu(gate.float())).to(out.dtype)  # norm_before_gate is off in every version
        return Inner(mixer.norm(gated) if mixer.rmsnorm else gated)

    return _by_parts(adaptor, record, documents, mixer, hidden, by_state)


def state_space_layer(mixer: Any) -> StateSpaceLayer:
    """The core of a MambaMixer, with the heads of this tensor-parallel rank."""
    names, exchange = import_module(MAMBA_MIXER), mixer.cp
    weight, bias = _convolution_weights(exchange)
    skip = exchange.D_cp1.float()
    scan = StateSpace(
        names.mamba_chunk_scan_combined,
        -torch.exp(exchange.A_log_cp1.float()),
        skip.unflatten(0, (-1, mixer.headdim)) if exchange.D_has_hdim else skip,
        exchange.dt_bias_cp1.float(),
        mixer.chunk_size,
        torch.float32,
    )
    convolve = _convolution(mixer.act, mixer.activation, names.causal_conv1d_fn)
    return StateSpaceLayer(scan, mixer.ngroups_local_tp, mixer.d_state, weight.squeeze(1), bias, convolve)


def _convolution_weights(exchange: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the convolution; up to 0.18 the exchange has them in a module."""
    module = getattr(exchange, "conv1d_cp1", None)
    if module is None:
        return exchange.conv1d_weight_cp1, exchange.conv1d_bias_cp1
    return module.weight, module.bias
