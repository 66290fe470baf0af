"""MindSpeed's Ulysses: the module and its calculators, and ``ulyssesattn_context_parallel`` based on our attention.

Shapes, s: tokens of this rank, b: batch, n: query heads, g: KV heads
    query (s, b, n, d) or (s, b, n * d)   key, value (s, b, g, d) or (s, b, g * d)   ->   (s, b, n * d)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.attention import ulysses_attention
from mindspeed_cp.attention.ulysses_attention import *  # noqa: F403  the same names, one of them more
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.link import link_of
from mindspeed_cp.compat.ring_layout import attention_of_rows, row_layout
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import boundaries
from mindspeed_cp.settings.config import ContextParallelConfig

__all__ = [*ulysses_attention.__all__, "ulyssesattn_context_parallel"]

# Sparse modes of the NPU operator: an explicit mask; the compressed causal mask; a band within the compressed mask.
MASKED, CAUSAL, BAND = (None, 0, 1), (2, 3), 4


def ulyssesattn_context_parallel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_para: Mapping[str, Any],
    ulysses_comm_para: Mapping[str, Any],
) -> torch.Tensor:
    """Aligned Ulysses attention with a KV cache policy; collective over the group.

    Args:
        attn_para: n_head (for three dimensions), attention_mask, scale, keep_prob, sparse_mode, pre_tokens,
            next_tokens, packed_seq_params. Sparse modes 2 and 3 are causal; 4 is a band: the query at p sees keys p -
            pre_tokens to p + next_tokens; other modes use the mask, or full attention without one. cu_seqlens_q holds
            the ends of packed documents in the concatenated rows of the batch.
        ulysses_comm_para: spg, the group; cache_policy; use_ulysses_allgather_kv. Heads are dimension 2, tokens 0.

    Raises:
        ValueError: the arguments are inconsistent or not supported; the message says what to change.
    """
    if (ulysses_comm_para.get("scatter_idx", 2), ulysses_comm_para.get("gather_idx", 0)) != (2, 0):
        raise ValueError(
            "ulyssesattn_context_parallel wants tokens first and heads third: scatter_idx 2, gather_idx 0."
        )
    query, key, value = _with_heads(query, key, value, attn_para)
    group, seen = ulysses_comm_para.get("spg"), _Seen.of(attn_para)
    size, packed = dist.get_world_size(group), attn_para.get("packed_seq_params")
    config = ContextParallelConfig(
        context_parallel_size=size,
        attention_mask_type="causal" if seen.causal else "full",
        kv_cache_policy=ulysses_comm_para.get("cache_policy") if size > 1 else None,
        allgather_kv=bool(ulysses_comm_para.get("use_ulysses_allgather_kv")),
    )
    ends = None if packed is None else boundaries(packed.cu_seqlens_q, leading_zero=True)
    layout, flat = _layout(config, query.size(0), query.size(1), ends)
    out = attention_of_rows(
        query,
        key,
        value,
        flat=flat,
        config=config,
        groups=_groups(group),
        layout=layout,
        softmax_scale=attn_para.get("scale"),
        attention_mask=seen.mask,
        cu_seqlens=ends,
        dropout_p=1.0 - attn_para.get("keep_prob", 1.0),
        sliding_window=seen.window,
    )
    return out.flatten(2)


@dataclass(frozen=True)
class _Seen:
    """The keys that a query sees within its document: causal, a window, or given by a mask."""

    causal: bool = False
    window: tuple[int, int] | None = None
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, para: Mapping[str, Any]) -> "_Seen":
        mode, mask = para.get("sparse_mode"), para.get("attention_mask")
        if mode in CAUSAL:
            return cls(causal=True)
        if mode == BAND:
            return cls(window=_band(para))
        if mode not in MASKED:
            raise ValueError(
                f"attn_para['sparse_mode'] {mode} is not supported; use 2 or 3 (causal), 4 (a band of pre_tokens and "
                "next_tokens), or 0 or 1 with the mask of the whole sequence."
            )
        if mask is not None and para.get("packed_seq_params") is not None:
            raise ValueError(
                f"attn_para['sparse_mode'] {mode} takes attention_mask for the whole mask, and packed_seq_params say "
                "where documents end; leave out one of the two, or choose sparse_mode 2 or 3 for causal attention "
                "within documents."
            )
        return cls(mask=mask)


def _band(para: Mapping[str, Any]) -> tuple[int, int]:
    """(pre_tokens, next_tokens) of sparse mode 4."""
    sides = para.get("pre_tokens"), para.get("next_tokens")
    if any(not isinstance(side, int) or side < 0 for side in sides):
        raise ValueError(
            f"attn_para['sparse_mode'] 4 is a band of pre_tokens and next_tokens, which are {sides[0]} and {sides[1]} "
            "and must be whole numbers of at least 0; pass both, or choose sparse_mode 2 for causal attention."
        )
    return sides  # type: ignore[return-value]


def _layout(
    config: ContextParallelConfig, local: int, batch: int, ends: tuple[int, ...] | None
) -> tuple[SequenceLayout, bool]:
    """(layout, whether the rows of the batch become one sequence).

    Raises:
        ValueError: the documents end neither with the sequence nor with the batch's concatenated rows.
    """
    size, seq_len = config.context_parallel_size, config.context_parallel_size * local
    if ends is None or batch == 1 and ends[-1] == seq_len:
        return SequenceLayout.build(config, seq_len), False
    if ends[-1] != batch * seq_len:
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q ends with {ends[-1]} and must end with {batch * seq_len}: {batch} rows of "
            f"{seq_len} tokens one after another, of which each of {size} ranks holds {local}."
        )
    return SequenceLayout(row_layout((local,) * size, False, batch).all_runs, config.hierarchy[0]), True


def _groups(group: dist.ProcessGroup | None) -> ContextParallelGroups:
    """ContextParallelGroups from an existing group; layers share its buffers."""
    link = link_of(group)
    if link.size == 1:
        return ContextParallelGroups((1, 1, 1), 0, link.global_ranks)
    return ContextParallelGroups(
        (link.size, 1, 1), link.rank, link.global_ranks, cp=link, ulysses=link, workspace=link.workspace
    )


def _with_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_para: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if query.dim() == 4:
        return query, key, value
    width = query.size(-1) // attn_para["n_head"]
    query, key, value = (tensor.unflatten(-1, (-1, width)) for tensor in (query, key, value))
    return query, key, value
