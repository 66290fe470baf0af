"""MindSpeed's Ulysses: the module and its calculators, and ``ulyssesattn_context_parallel`` on top of our attention.

Shapes, s: tokens of this rank, b: batch, n: query heads, g: KV heads
    query (s, b, n, d) or (s, b, n * d)   key, value (s, b, g, d) or (s, b, g * d)   ->   (s, b, n * d)
"""

from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.attention import ulysses_attention
from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.attention.ulysses_attention import *  # noqa: F403  the same names, one of them more
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.link import link_of
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig

__all__ = [*ulysses_attention.__all__, "ulyssesattn_context_parallel"]

CAUSAL = (2, 3)  # sparse modes of the NPU operator that take the compressed causal mask


def ulyssesattn_context_parallel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_para: dict[str, Any],
    ulysses_comm_para: dict[str, Any],
) -> torch.Tensor:
    """Aligned Ulysses attention with a KV cache policy; every rank of the group calls it.

    Args:
        attn_para: n_head (for three dimensions), attention_mask, scale, keep_prob, sparse_mode, packed_seq_params. A
            sparse mode of 2 or 3 is causal; else the mask says all, and without one every token sees every token.
        ulysses_comm_para: spg, the group; cache_policy; use_ulysses_allgather_kv. Heads are dimension 2, tokens 0.

    Raises:
        ValueError: something cannot be computed as asked; the message says what to change.
    """
    if (ulysses_comm_para.get("scatter_idx", 2), ulysses_comm_para.get("gather_idx", 0)) != (2, 0):
        raise ValueError(
            "ulyssesattn_context_parallel wants tokens first and heads third: scatter_idx 2, gather_idx 0."
        )
    query, key, value = _with_heads(query, key, value, attn_para)
    group, causal = ulysses_comm_para.get("spg"), attn_para.get("sparse_mode") in CAUSAL
    size, packed = dist.get_world_size(group), attn_para.get("packed_seq_params")
    config = ContextParallelConfig(
        context_parallel_size=size,
        attention_mask_type="causal" if causal else "full",
        kv_cache_policy=ulysses_comm_para.get("cache_policy") if size > 1 else None,
        allgather_kv=bool(ulysses_comm_para.get("use_ulysses_allgather_kv")),
    )
    mask = None if causal or packed is not None else attn_para.get("attention_mask")
    out = context_parallel_attention(
        query,
        key,
        value,
        config=config,
        groups=_groups(group),
        layout=SequenceLayout.build(config, size * query.size(0)),
        softmax_scale=attn_para.get("scale"),
        attention_mask=mask,
        cu_seqlens=None if packed is None else _boundaries(packed.cu_seqlens_q),
        dropout_p=1.0 - attn_para.get("keep_prob", 1.0),
    )
    return out.flatten(2)


def _groups(group):
    """ContextParallelGroups of a group that exists already; layers share its buffers."""
    link = link_of(group)
    if link.size == 1:
        return ContextParallelGroups((1, 1, 1), 0, link.global_ranks)
    return ContextParallelGroups(
        (link.size, 1, 1), link.rank, link.global_ranks, cp=link, ulysses=link, workspace=link.workspace
    )


def _with_heads(query, key, value, attn_para):
    if query.dim() == 4:
        return query, key, value
    width = query.size(-1) // attn_para["n_head"]
    return tuple(tensor.unflatten(-1, (-1, width)) for tensor in (query, key, value))


def _boundaries(ends):
    values = ends.flatten().tolist() if isinstance(ends, torch.Tensor) else list(ends)
    return tuple(values if values[0] == 0 else [0, *values])
