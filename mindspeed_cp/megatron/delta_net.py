"""Megatron's gated delta nets: their projections, kernels and weights, between the exchanges of mindspeed_cp.linear.

The kernels are those that the layer's Megatron has chosen: flash-linear-attention's, or torch's in deterministic mode.
s: tokens of this rank, b: batch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mindspeed_cp.linear.gated_delta import DeltaHeads, DeltaLayer, DeltaWeights
from mindspeed_cp.linear.recurrence import Convolution, Documents, Recurrence, boundaries_on, causal_convolution
from mindspeed_cp.linear.rows import contiguous_parts, conversion, exchange_rows
from mindspeed_cp.megatron.batches import block_record
from mindspeed_cp.megatron.hidden_exchange import exchange_of
from mindspeed_cp.megatron.scopes import Scope

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

MODULE = "megatron.core.ssm.gated_delta_net"
Rows = Callable[[torch.Tensor], torch.Tensor]


class Move(NamedTuple):
    """How rows come to the layout that a layer wants, and back."""

    there: Rows
    back: Rows


STAY = Move(lambda rows: rows, lambda rows: rows)


def computed(adaptor: "Adaptor", scope: Scope, module: Any, hidden: torch.Tensor, params: Any) -> tuple[Any, Any]:
    """What the layer gives for this rank's tokens, and the bias of its last projection.

    Args:
        module: a GatedDeltaNet. hidden: (s, b, hidden), s divided by sequence parallelism.
        params: PackedSeqParams in thd, None for whole sequences.

    Raises:
        ValueError: fewer heads than ranks where heads are shared out.
    """
    record, link = block_record(adaptor, scope, module.config, hidden.size(0), params), scope.groups.cp
    assert link is not None, "what is alone is Megatron's own"
    layout, layer = record.layout, layer_of(module)
    documents = (0, layout.seq_len) if params is None else _documents(adaptor, params, layout.seq_len)
    if scope.config.linear_exchange == "heads":
        _check_heads(layer.heads, link.size)
        compute = partial(layer.by_heads, exchange=exchange_of(scope, layout), documents=documents)
        return _forward(module, hidden, compute, STAY, STAY)
    parts = contiguous_parts(layout)
    compute = partial(layer.by_state, link=link, parts=parts, documents=documents)
    plans = conversion(layout, parts), conversion(parts, layout)
    move = Move(*(partial(exchange_rows, plan=plan, link=link, purpose="tokens") for plan in plans))
    if module.config.sequence_parallel:  # whose rows are gathered by the first projection
        return _forward(module, hidden, compute, STAY, move)
    with adaptor.running(replace(record, layout=parts, moved_from=layout)):
        return _forward(module, hidden, compute, move, STAY)


def _forward(
    module: Any, hidden: torch.Tensor, compute: Callable[..., torch.Tensor], around: Move, inside: Move
) -> tuple[Any, Any]:
    """The layer, with its rows moved around its projections or inside them.

    Args:
        compute: inputs of the convolution, beta and alpha -> (s, b, value heads, value_dim).
    """
    projected = inside.there(module.in_proj(around.there(hidden))[0])
    inputs, gate, gates = _split(module, projected)
    core = compute(inputs, gates)
    kept = None
    if getattr(module, "recompute_norm_out", False):  # of 0.19, --recompute-modules gdn_norm_out
        from megatron.core.tensor_parallel import CheckpointWithoutOutput

        kept = CheckpointWithoutOutput(fp8=module.config.fp8)  # by default it asks Transformer Engine
    gated = _gated(module, core, gate) if kept is None else kept.checkpoint(partial(_gated, module), core, gate)
    out, bias = module.out_proj(inside.back(gated))
    if kept is not None:
        kept.discard_output_and_register_recompute(out)
    return around.back(out), bias


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
        Recurrence(rule, not config.deterministic_mode, torch.float32),
        _convolution(module, names),
        names.l2norm if module.use_qk_l2norm else None,
    )


def _split(module: Any, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(s, b, width) -> inputs of the convolution (s, b, channels), gate of the output (s, b, v), beta and alpha."""
    tp = module.tp_size
    widths = (2 * module.qk_dim + module.v_dim) // tp, module.v_dim // tp, 2 * module.num_value_heads // tp
    return tuple(projected.split(widths, dim=-1))


def _gated(module: Any, core: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """(s, b, value heads, value_dim) and (s, b, v) -> (s, b, v), normed and gated."""
    gate = gate.unflatten(-1, core.shape[2:])
    normed: torch.Tensor = module._apply_gated_norm(core.contiguous(), gate.contiguous())
    return normed.reshape(*core.shape[:2], -1)


def _documents(adaptor: "Adaptor", params: Any, seq_len: int) -> Documents:
    """Where the state begins anew: with every packed document, padding included, as in Megatron."""
    ends: Documents = adaptor.boundaries.padded(params)
    return ends if ends[-1] == seq_len else (*ends, seq_len)  # what is behind them is a document of its own


def _check_heads(heads: DeltaHeads, ranks: int) -> None:
    if heads.values < ranks:
        raise ValueError(
            f"--cp-linear-exchange heads needs a value head of gated delta nets for each of the {ranks} "
            f"context-parallel ranks, and a tensor-parallel rank has {heads.values} (--linear-num-value-heads); use "
            "--cp-linear-exchange state."
        )


def _convolution(module: Any, names: Any) -> Convolution:
    """The convolution that the layer's Megatron would run."""
    fla, dao = getattr(names, "causal_conv1d", None), getattr(names, "causal_conv1d_fn", None)
    if module.config.deterministic_mode or (fla is None and dao is None):
        return lambda *arguments: module.act_fn(causal_convolution(*arguments))
    if fla is not None:
        return partial(_by_fla, fla, module.activation)
    return partial(_by_causal_conv1d, dao, module.activation)


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


def _by_causal_conv1d(
    function: Any,
    activation: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: Documents,
) -> torch.Tensor:
    found = [
        function(x=rows[:, low:high].transpose(1, 2).contiguous(), weight=weight, bias=bias, activation=activation)
        for low, high in zip(documents, documents[1:])
    ]
    return torch.cat(found, dim=-1).transpose(1, 2)
