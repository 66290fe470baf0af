"""From Megatron's core attention call to ``context_parallel_attention``.

Shapes, s: tokens of this rank, b: batch, n: query heads of this tensor-parallel rank, g: its KV heads, d: head dim
    query (s, b, n, dk)    key (s, b, g, dk)    value (s, b, g, dv)    ->    (s, b, n * dv)
Packed sequences (thd) have no batch: (s, n, d) -> (s, n * dv). The dense mask is global, (b, 1, S, S) or (1, 1, S, S).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.attention.exchanged import Exchanged
from mindspeed_cp.attention.expansion import Expansion
from mindspeed_cp.attention.gather_size import calculator_named
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.megatron.batches import record_of_length
from mindspeed_cp.megatron.packed import packed_batch
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.megatron.sizes import check_local_size
from mindspeed_cp.megatron.splitting import built
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import warn_rank0

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor


@dataclass(frozen=True)
class CoreAttention:
    """Description of a core attention module, independent of its class.

    Args:
        layer_number: global, from 1.
        causal: whether attention is causal if no mask is given.
        softmax_scale: factor for the scores.
        dropout_p: 0 outside training.
        window: (left, right) of a sliding window, or None.
        softmax_offset: (n,) attention sinks, or None.
        expand: computes keys and values from the module's arguments; None if these are keys and values.
        rng: () -> context manager inside which dropout draws its seed.
    """

    layer_number: int
    causal: bool
    softmax_scale: float
    dropout_p: float = 0.0
    window: tuple[int, int] | None = None
    softmax_offset: torch.Tensor | None = None
    expand: Expansion | None = None
    rng: Callable[[], AbstractContextManager[Any]] = nullcontext


def attention(
    adaptor: "Adaptor",
    scope: Scope,
    core: CoreAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    packed_seq_params: Any = None,
    others: Mapping[str, Any] | None = None,
    around: Exchanged | None = None,
) -> torch.Tensor:
    """Attention of the whole sequence for this rank's queries.

    Args:
        scope: the ranks over which the module computes.
        packed_seq_params: Megatron's PackedSeqParams, or None.
        others: all other arguments of core attention; a gather-size calculator gets them unchanged.
        around: the exchange of a UlyssesContextAttention around this module, or None.

    Returns:
        (s, b, n * dv), or (s, n * dv) for tensors without batch.
    """
    without_batch = query.dim() == 3
    if without_batch:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    call = Call(adaptor, scope, core, (query, key, value), around)
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        record = _packed_record(call, packed_seq_params)
        out = _attend(call, record, causal=core.causal and not _asked_for_full(scope))
    else:
        if packed_seq_params is not None and not adaptor.sizes:
            check_local_size(packed_seq_params, scope.size)
            raise ValueError(
                f"packed_seq_params with qkv_format {packed_seq_params.qkv_format} are not supported with context "
                "parallelism; use qkv_format thd, or leave them out."
            )
        name = "default" if adaptor.setup is None else adaptor.setup.gather_size_calculator
        calculator = None if name == "default" else calculator_named(name)
        size = None
        if calculator is not None:
            size = calculator.calculate(attention_mask, packed_seq_params=packed_seq_params, **(others or {}))
        out = _unpacked(call, attention_mask, size)
    return out.flatten(2).squeeze(1) if without_batch else out.flatten(2)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value


@dataclass(frozen=True)
class Call:
    """One call of core attention: the arguments of ``attention``, tensors with their batch."""

    adaptor: "Adaptor"
    scope: Scope
    core: CoreAttention
    tensors: Tensors
    around: Exchanged | None

    @property
    def rows(self) -> int:
        """How many tokens of the sequence this rank holds."""
        seen = self.tensors[0].shape[0]
        return seen if self.around is None else self.around.local_length(seen)


def _packed_record(call: Call, params: Any) -> MicroBatch:
    """The record of packed documents, in which each query sees its own document, causally or fully."""
    adaptor, scope, rows = call.adaptor, call.scope, call.rows
    record = adaptor.running_in(scope)
    if record is None or record.documents is None:
        record = packed_batch(adaptor, scope, params, rows, record=record)
    with adaptor.running(record):
        return record_of_length(adaptor, scope, rows)


def _asked_for_full(scope: Scope) -> bool:
    """Whether --cp-attention-mask-type full applies: without a mask every query sees its whole document, whatever the
    layer's mask type.
    """
    return not scope.alone and scope.config.attention_mask_type == "full"


def _unpacked(call: Call, attention_mask: torch.Tensor | None, gather_size: int | None) -> torch.Tensor:
    adaptor, core = call.adaptor, call.core
    if attention_mask is None:
        record = _record(call, gather_size)
        causal = (core.causal or record.documents is not None) and not _asked_for_full(call.scope)
        return _attend(call, record, causal=causal)
    if adaptor.active is not None and adaptor.active.slices is not None:
        raise ValueError(
            "attention got an attention_mask, and the batch came with slices, which say what its tokens see; pass None "
            "as the model's attention_mask, or leave the slices out of the batch."
        )
    mask = _four_dimensional(attention_mask, call.tensors[0].shape[1])
    if mask.shape[2] != mask.shape[3]:
        raise _partial_mask(adaptor, attention_mask)
    size = mask.shape[-1] if gather_size is None else gather_size
    record = _record(call, size, mask=attention_mask)
    layout = replace(record, documents=None)
    facts = adaptor.masks.facts(attention_mask, mask.bool, adaptor.forward_pass)
    if core.window is not None:
        if not facts.is_causal:
            warn_rank0(
                "window_size replaces the attention mask of the batch, as in Megatron's own local attention; "
                "leave out --reset-attention-mask, or window_size."
            )
        return _attend(call, layout, causal=False)
    if facts.slices is not None:
        return _attend(call, replace(layout, slices=facts.slices), causal=False)
    if facts.documents is None:
        return _attend(call, layout, causal=False, mask=mask.bool())
    # The batch's mask overrides every flag: it is causal within these documents.
    return _attend(call, replace(record, documents=facts.documents), causal=True)


def _partial_mask(adaptor: "Adaptor", attention_mask: torch.Tensor) -> ValueError:
    size = "S" if adaptor.active is None else adaptor.active.seq_len
    return ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}, and context parallelism needs the mask "
        f"of the whole sequence, (batch, 1, {size}, {size}); do not split it over the ranks."
    )


def _record(call: Call, seq_len: int | None, mask: torch.Tensor | None = None) -> MicroBatch:
    """The record of the batch.

    Args:
        seq_len: length of the whole sequence from a mask or a calculator, else None.
        mask: that mask.
    """
    adaptor, scope, rows = call.adaptor, call.scope, call.rows
    active = adaptor.running_in(scope)
    if scope.alone and (active is None or not active.limits_attention):
        return MicroBatch(built(scope.config, rows), None, scope)
    if seq_len is None or (active is not None and active.seq_len == seq_len):
        return record_of_length(adaptor, scope, rows)
    if mask is not None and (
        active is not None or adaptor.layout(int(seq_len), scope=scope).length(scope.rank) != rows
    ):
        raise _partial_mask(adaptor, mask)
    return MicroBatch(adaptor.layout(int(seq_len), scope=scope), None, scope)


def _attend(call: Call, record: MicroBatch, *, causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    adaptor, scope, core = call.adaptor, call.scope, call.core
    computed = scope.config, scope.groups, record.layout
    config, groups, layout = computed if call.around is None else call.around.alone(*computed)
    window: tuple[int | None, int | None] | None = core.window
    if window is not None:
        left, right = (None if side is None or side < 0 else side for side in window)
        causal = right == 0 or (right is None and causal)
        # Causal layers have their right limit from the mask type, and slices from their kinds.
        window = (left, None if causal else right)
    query, key, value = call.tensors
    documents, slices = record.documents, record.slices
    with core.rng() if core.dropout_p else nullcontext():
        return context_parallel_attention(
            query,
            key,
            value,
            config=effective_config(config, "causal" if causal else "full"),
            groups=groups,
            layout=layout,
            softmax_scale=core.softmax_scale,
            attention_mask=mask,
            cu_seqlens=documents[0] if documents is not None and len(documents) == 1 else documents,
            dropout_p=core.dropout_p,
            layer_number=core.layer_number,
            kernel=select_kernel(adaptor.kernel, query.device.type),
            sliding_window=window,
            softmax_offset=core.softmax_offset,
            fused_update=adaptor.settings.fused_update,
            kept=adaptor.kept,
            expand=core.expand,
            attention_slices=slices[0] if slices is not None and len(slices) == 1 else slices,
        )


def effective_config(config: ContextParallelConfig, attention_mask_type: str) -> ContextParallelConfig:
    """``config`` with another mask type; the layout is not changed."""
    return config if config.attention_mask_type == attention_mask_type else _with_mask(config, attention_mask_type)


@lru_cache(maxsize=64)
def _with_mask(config: ContextParallelConfig, attention_mask_type: Any) -> ContextParallelConfig:
    return replace(config, attention_mask_type=attention_mask_type)


def _four_dimensional(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """The mask as (batch or 1, 1, S, S); a mask over keys only is broadcast over the queries."""
    if mask.dim() == 2:
        mask = mask[None, None]
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; pass (S, S), (1, 1, S, S) or ({batch}, 1, S, S), "
            "True where attention is masked out."
        )
    return mask.expand(-1, -1, mask.shape[3], -1) if mask.shape[2] == 1 and mask.shape[3] > 1 else mask


def layer_window(sliding_window: Any, skip_freq: Any, layer_number: int) -> tuple[int, int] | None:
    """The sliding window of one layer, None for full attention.

    Args:
        sliding_window: TransformerConfig.window_size, (left, right) or None.
        skip_freq: TransformerConfig.window_attn_skip_freq: with None every layer has the window, with N every N-th
            layer has none, a list says it per layer.
        layer_number: global, from 1.
    """
    if sliding_window is None:
        return None
    left, right = sliding_window
    if skip_freq is None:
        return left, right
    windowed = skip_freq[layer_number - 1] if isinstance(skip_freq, (list, tuple)) else layer_number % skip_freq != 0
    return (left, right) if windowed else None
