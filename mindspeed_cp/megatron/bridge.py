"""From Megatron's core attention call to ``context_parallel_attention``.

Shapes, s: tokens of this rank, b: batch, n: query heads of this tensor-parallel rank, g: its KV heads, d: head dim
    query (s, b, n, dk)    key (s, b, g, dk)    value (s, b, g, dv)    ->    (s, b, n * dv)
Packed sequences (thd) have no batch: (s, n, d) -> (s, n * dv). The dense mask is global, (b, 1, S, S) or (1, 1, S, S).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.megatron.packed import packed_batch
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.state import SINGLE, effective_config
from mindspeed_cp.patches.dynamic import check_local_size
from mindspeed_cp.settings.notices import warn_rank0


@dataclass(frozen=True)
class CoreAttention:
    """What a core attention module says about itself, whatever its class.

    Args:
        layer_number: global, 1-based.
        causal: whether attention is causal when no mask is given.
        softmax_scale: factor on the scores.
        dropout_p: 0 outside training.
        window: (left, right) of a sliding window, None without.
        softmax_offset: (n,) attention sinks, or None.
        rng: () -> context manager inside which dropout draws its seed.
    """

    layer_number: int
    causal: bool
    softmax_scale: float
    dropout_p: float = 0.0
    window: tuple[int, int] | None = None
    softmax_offset: torch.Tensor | None = None
    rng: Callable[[], AbstractContextManager] = nullcontext


class AttentionBridge:
    """Computes Megatron's core attention for one AdaptorState."""

    def __init__(self, state):
        self._state = state

    def __call__(self, module, query, key, value, attention_mask=None, packed_seq_params=None, **others):
        """Attention of the whole sequence for this rank's queries.

        Args:
            module: CoreAttention.
            packed_seq_params: Megatron's PackedSeqParams, or None.
            others: whatever else core attention was called with; a gather-size calculator gets it as it is.

        Returns:
            (s, b, n * dv), or (s, n * dv) for tensors without batch.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        without_batch = query.dim() == 3
        if without_batch:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        if packed:
            out = self._packed(module, query, key, value, packed_seq_params)
        elif packed_seq_params is not None and not self.is_dynamic:
            check_local_size(packed_seq_params, self._state.cp_size)
            raise ValueError(
                f"packed_seq_params with qkv_format {packed_seq_params.qkv_format} are not supported with context "
                "parallelism; use qkv_format thd, or leave them out."
            )
        else:
            calculator = self._state.gather_size_calculator()
            size = (
                None
                if calculator is None
                else calculator.calculate(attention_mask, packed_seq_params=packed_seq_params, **others)
            )
            out = self._unpacked(module, query, key, value, attention_mask, size)
        return out.flatten(2).squeeze(1) if without_batch else out.flatten(2)

    @property
    def is_dynamic(self) -> bool:
        """Whether micro-batches bring sizes of their own; parameters of whole sequences say no more."""
        return bool(self._state.sizes)

    def _packed(self, module, query, key, value, params):
        """Packed documents: each query sees its own, all of it or what lies before."""
        state, rows = self._state, query.shape[0]
        record = state.active
        if record is None or record.documents is None:
            record = packed_batch(state, params, rows, record=record)
        with state.running(record):
            record = state.micro_batch(rows)
        return self._attend(module, query, key, value, record, causal=module.causal and not self._asked_for_full)

    @property
    def _asked_for_full(self):
        """--cp-attention-mask-type full: without a mask every query sees its whole document, whatever the layer's own
        mask type is.
        """
        config = self._state.config
        return self._state.groups is not None and config.attention_mask_type == "full"

    def _unpacked(self, module, query, key, value, attention_mask, gather_size):
        if attention_mask is None:
            record = self._record(query.shape[0], gather_size)
            causal = (module.causal or record.documents is not None) and not self._asked_for_full
            return self._attend(module, query, key, value, record, causal=causal)
        mask = self._checked_mask(attention_mask, query)
        size = mask.shape[-1] if gather_size is None else gather_size
        record = self._record(query.shape[0], size, mask=attention_mask)
        facts = self._state.masks.facts(attention_mask, lambda: _as_bool(mask))
        if module.window is not None:
            if not facts.is_causal:
                warn_rank0(
                    "window_size replaces the attention mask of the batch, as in Megatron's own local attention; "
                    "leave out --reset-attention-mask, or window_size."
                )
            return self._attend(module, query, key, value, MicroBatch(record.layout), causal=False)
        if facts.documents is None:
            mask, record = _as_bool(mask), MicroBatch(record.layout)
            return self._attend(module, query, key, value, record, causal=False, mask=mask)
        # The mask is the batch's, and wins over every flag: it is causal within these documents.
        return self._attend(module, query, key, value, MicroBatch(record.layout, facts.documents), causal=True)

    def _checked_mask(self, attention_mask, query):
        mask = _four_dimensional(attention_mask, query.shape[1])
        if mask.shape[2] != mask.shape[3]:
            raise self._partial_mask(attention_mask)
        return mask

    def _partial_mask(self, attention_mask):
        active = self._state.active
        size = "S" if active is None else active.seq_len
        return ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, and context parallelism needs the mask "
            f"of the whole sequence, (batch, 1, {size}, {size}); do not split it over the ranks."
        )

    def _record(self, rows, seq_len, mask=None):
        """The record of the batch, of which this rank has ``rows`` tokens.

        Args:
            seq_len: length of the whole sequence where a mask or a calculator says it, else None.
            mask: the mask that says it.
        """
        state = self._state
        if seq_len is None or (state.active is not None and state.active.seq_len == seq_len):
            return state.micro_batch(rows)
        if mask is not None and (state.active is not None or _holds(state, int(seq_len)) != rows):
            raise self._partial_mask(mask)
        return MicroBatch(state.layout(int(seq_len)))

    def _attend(self, module, query, key, value, record, *, causal, mask=None):
        state, window = self._state, module.window
        if window is not None:
            left, right = (None if side is None or side < 0 else side for side in window)
            causal = right == 0 or (right is None and causal)
            window = (left, None if causal else right)
        # Packed sequences reach this with context_parallel_size 1 too.
        config, groups = (SINGLE, _single_groups()) if state.groups is None else (state.config, state.groups)
        kernel = select_kernel(state.kernel, query.device.type)
        documents = record.documents
        with module.rng() if module.dropout_p else nullcontext():
            return context_parallel_attention(
                query,
                key,
                value,
                config=effective_config(config, "causal" if causal else "full"),
                groups=groups,
                layout=record.layout,
                softmax_scale=module.softmax_scale,
                attention_mask=mask,
                cu_seqlens=documents[0] if documents is not None and len(documents) == 1 else documents,
                dropout_p=module.dropout_p,
                layer_number=module.layer_number,
                kernel=kernel,
                sliding_window=window,
                softmax_offset=module.softmax_offset,
                fused_update=state.setup is not None and state.setup.fused_update,
                kept=state.kept,
            )


def _holds(state, seq_len):
    """How many tokens of a sequence that this project splits lie on this rank."""
    return state.layout(seq_len).length(state.cp_rank)


@cache
def _single_groups():
    return ContextParallelGroups.build(SINGLE)


def _four_dimensional(mask, batch):
    """The mask as (batch or 1, 1, S, S); a mask of keys alone is broadcast over the queries."""
    if mask.dim() == 2:
        mask = mask[None, None]
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; pass (S, S), (1, 1, S, S) or ({batch}, 1, S, S), "
            "True where attention is masked out."
        )
    return mask.expand(-1, -1, mask.shape[3], -1) if mask.shape[2] == 1 and mask.shape[3] > 1 else mask


def _as_bool(mask):
    return mask if mask.dtype == torch.bool else mask.bool()


def layer_window(window_size, skip_freq, layer_number):
    """The sliding window of one layer, None for full attention.

    Args:
        window_size: (left, right) of TransformerConfig, or None.
        skip_freq: TransformerConfig.window_attn_skip_freq: None windows every layer, N leaves out every N-th, a list
            says it per layer.
        layer_number: global, 1-based.
    """
    if window_size is None:
        return None
    if skip_freq is None:
        return tuple(window_size)
    windowed = skip_freq[layer_number - 1] if isinstance(skip_freq, (list, tuple)) else layer_number % skip_freq != 0
    return tuple(window_size) if windowed else None
