"""MindSpeed's ``ringattn_context_parallel``: its arguments, mapped onto ``context_parallel_attention``.

Shapes, s: tokens of this rank, b: batch, n: query heads, g: KV heads
    q (s, b, n * dk)   k (s, b, g * dk)   v (s, b, g * dv)   ->   (s, b, n * dv)

Which tokens a rank holds follows MindSpeed:
    causal        chunks r and 2cp-1-r of 2cp, the two halves of the rank's tokens; the first gets an odd token
    not causal    contiguous
    causal, packed, if boundaries count this rank's tokens or are padded ones: both halves of every document
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.link import link_of, within
from mindspeed_cp.compat.ring_layout import attention_of_rows, document_layout, row_layout
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import Boundaries, boundaries
from mindspeed_cp.settings.algorithms import Hierarchy
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import warn_rank0

__all__ = ["ringattn_context_parallel"]

COMPRESSED = (2048, 2048)  # shape of the causal mask that the NPU operators take for any length
REQUIRED = ("causal", "cp_group", "cp_size", "rank", "cp_global_ranks")


def ringattn_context_parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n: int,
    cp_para: Mapping[str, Any],
    softmax_scale: float | None = None,
    attn_mask: torch.Tensor | list[torch.Tensor] | None = None,
    dropout_p: float = 0.0,
    packed_seq_params: Any = None,
    shapes: Sequence[int] | Mapping[int, int] | None = None,
) -> torch.Tensor:
    """Ring or Double Ring attention over the ranks that ``cp_para`` names; collective over them.

    Args:
        q, k, v: (s, b, heads * dim), or (tokens, heads, dim) with packed documents.
        n: number of query heads; the number of KV heads follows from the width of k.
        cp_para: dict with causal, cp_group, cp_size, rank, cp_global_ranks; optional cp_inner_ranks (the window),
            cp_group_for_send_recv_overlap (its presence switches overlap on), cache_policy.
        attn_mask: None; if causal, also a causal mask, compressed or whole; else the mask of the whole sequence, bool,
            True = masked out, or a list of blocks, this rank's queries against each rank's keys.
        packed_seq_params: object with cu_seqlens_q, which may omit the leading 0 and may count over the whole batch.
        shapes: tokens of every rank if they differ (0 is allowed): a list in ring order, or a dict by index in the ring
            or by global rank.

    Returns:
        (s, b, n * dv), or (tokens, n, dv).

    Raises:
        ValueError: the arguments are inconsistent or not supported; the message says what to change.
    """
    place = _Place.of(cp_para)
    documents = None if packed_seq_params is None else _Documents.of(packed_seq_params)
    without_batch = (
        documents is not None
        and q.shape[1] == n
        and documents.values[-1] == q.shape[0] * (place.size if documents.padded else 1)
    )
    query, key, value = _with_heads(q, k, v, n, without_batch)
    lengths = _lengths(shapes, query.shape[0], place)
    layout, cu_seqlens, flattened = _layout(place, lengths, query.shape[1], documents)
    out = attention_of_rows(
        query,
        key,
        value,
        flat=flattened,
        config=place.config if documents is None else place.causal_config,
        groups=place.groups,
        layout=layout,
        softmax_scale=softmax_scale,
        attention_mask=_global_mask(attn_mask, layout, place, documents),
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
    )
    return out.squeeze(1) if without_batch else out.flatten(2)


@dataclass(frozen=True)
class _Place:
    """This rank's index in the ring, from cp_para; ``causal_config`` is for packed documents."""

    config: ContextParallelConfig
    causal_config: ContextParallelConfig
    groups: ContextParallelGroups
    size: int
    rank: int

    @property
    def causal(self) -> bool:
        return self.config.attention_mask_type == "causal"

    @classmethod
    def of(cls, para: Mapping[str, Any]) -> "_Place":
        missing = [name for name in REQUIRED if name not in para]
        if missing:
            raise ValueError(f"cp_para has no {', '.join(missing)}; it needs {', '.join(REQUIRED)}.")
        if para.get("pse") is not None:
            raise ValueError(
                "cp_para['pse'] (position bias, ALiBi) is not supported; leave it out and use rotary "
                "position embeddings, or run with --context-parallel-size 1."
            )
        size, rank, ranks = para["cp_size"], para["rank"], tuple(para["cp_global_ranks"])
        if len(ranks) != size or not 0 <= rank < size or ranks[rank] != dist.get_rank():
            raise ValueError(
                f"cp_para has cp_size {size}, rank {rank} and cp_global_ranks {list(ranks)} on global "
                f"rank {dist.get_rank()}; cp_global_ranks must list the ring's {size} ranks in ring "
                "order."
            )
        overlap = para.get("cp_group_for_send_recv_overlap")
        settings: dict[str, Any] = {
            "context_parallel_size": size,
            "algorithm": "megatron_cp_algo",
            "window_size": _window(para, ranks, rank),
            "kv_cache_policy": para.get("cache_policy") if size > 1 else None,
            "send_recv_overlap": overlap is not None,
        }
        causal = ContextParallelConfig(**settings)
        config = causal if para["causal"] else ContextParallelConfig(**settings, attention_mask_type="full")
        groups = _groups(config.hierarchy, rank, ranks, para["cp_group"], overlap)
        return cls(config, causal, groups, size, rank)


def _window(para: Mapping[str, Any], ranks: tuple[int, ...], rank: int) -> int:
    """Size of the inner window; the inner ranks must be consecutive in the ring."""
    inner = list(para.get("cp_inner_ranks") or [])
    window = len(inner)
    if window in (0, 1, len(ranks)):
        return 1
    start = rank // window * window
    if len(ranks) % window or inner != list(ranks[start : start + window]):
        raise ValueError(
            f"cp_para['cp_inner_ranks'] {inner} must be this rank's window of cp_global_ranks "
            f"{list(ranks)}: a size that divides {len(ranks)}, neighbours in ring order."
        )
    return window


def _groups(
    hierarchy: Hierarchy,
    rank: int,
    global_ranks: tuple[int, ...],
    cp_group: dist.ProcessGroup,
    overlap_group: dist.ProcessGroup | None,
) -> ContextParallelGroups:
    """ContextParallelGroups from existing groups; layers share the buffers, which live as long as cp_group.

    The whole ring's group also serves the windows. The second group is for transfers between windows, so that they do
    not queue behind transfers within a window.
    """
    if len(global_ranks) == 1:
        return ContextParallelGroups(hierarchy, 0, global_ranks)
    link = link_of(cp_group)
    ring = within(link, link.group, global_ranks)
    outer = within(ring, overlap_group or link.group, global_ranks) if hierarchy[2] > 1 else None
    return ContextParallelGroups(
        hierarchy, rank, global_ranks, cp=ring, ring=ring, outer=outer, workspace=ring.workspace
    )


def _with_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int, without_batch: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (s, b, heads, dim)."""
    if without_batch:
        return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    width = q.shape[-1] // n
    if q.dim() != 3 or q.shape[-1] % n or k.shape[-1] % max(width, 1):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (seq, batch, heads * head_dim), q with n "
            f"= {n} heads; k's last dimension must be a multiple of q's head_dim."
        )
    kv_heads = k.shape[-1] // width
    if v.shape[-1] % kv_heads:
        raise ValueError(
            f"v {tuple(v.shape)} cannot be cut into the {kv_heads} KV heads that k {tuple(k.shape)} has; "
            "give it as many."
        )
    return q.unflatten(-1, (n, width)), k.unflatten(-1, (kv_heads, width)), v.unflatten(-1, (kv_heads, -1))


def _lengths(shapes: Sequence[int] | Mapping[int, int] | None, local: int, place: _Place) -> tuple[int, ...]:
    """Tokens of every rank, in ring order."""
    if shapes is None:
        return (local,) * place.size
    if isinstance(shapes, Mapping):
        names = range(place.size), place.groups.global_ranks
        in_order = [shapes[name] for name in next((each for each in names if set(each) == set(shapes)), ())]
    else:
        in_order = list(shapes)
    if len(in_order) != place.size or in_order[place.rank] != local:
        raise ValueError(
            f"shapes {shapes if isinstance(shapes, Mapping) else list(shapes)} must hold the tokens of each of the "
            f"{place.size} ranks, and this rank (place {place.rank} of the ring) has {local}; pass the first dimension "
            "of every rank's q, in ring order, or a dict by place in the ring, else by global rank."
        )
    return tuple(int(length) for length in in_order)


@dataclass(frozen=True)
class _Documents:
    """Document boundaries.

    Args:
        values: the boundaries, with a leading 0.
        padded: whether they come from cu_seqlens_q_padded and thus count the tokens of all ranks.
        leading_zero: whether the 0 was given; MindSpeed's own boundaries have none.
    """

    values: Boundaries
    padded: bool
    leading_zero: bool

    @classmethod
    def of(cls, params: Any) -> "_Documents":
        padded = getattr(params, "cu_seqlens_q_padded", None)
        given = params.cu_seqlens_q if padded is None else padded
        first = given.flatten()[:1].tolist() if isinstance(given, torch.Tensor) else list(given[:1])
        return cls(boundaries(given, leading_zero=True), padded is not None, first == [0])


def _layout(
    place: _Place, lengths: tuple[int, ...], batch: int, documents: _Documents | None
) -> tuple[SequenceLayout, Boundaries | None, bool]:
    """(layout, cu_seqlens or None, whether batch rows become one sequence)."""
    zigzag, seq_len, local = place.causal, sum(lengths), lengths[0] * batch
    if documents is None:
        return row_layout(lengths, zigzag, 1), None, False
    values, total = documents.values, documents.values[-1]
    if not place.causal:
        # As in MindSpeed, where "general" with documents also masks the keys after the query.
        warn_rank0(
            "cp_para['causal'] is False with packed_seq_params: ranks hold contiguous tokens, and attention is "
            "causal within each document, as in MindSpeed; call context_parallel_attention for full attention "
            "within documents."
        )
    whole = total in (seq_len, seq_len * batch)
    if (
        zigzag
        and len(set(lengths)) == 1
        and (
            total == seq_len * batch if documents.padded else total == local and not (whole and documents.leading_zero)
        )
    ):
        values = tuple(value // place.size for value in values) if documents.padded else values
        return document_layout(values, place.size), tuple(place.size * value for value in values), batch > 1
    if not whole:
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q ends with {total}; it must end with the whole sequence's "
            f"{seq_len} tokens, or {seq_len * batch} over the batch"
            + (f", or with this rank's {local}." if zigzag else ".")
        )
    rows = 1 if total == seq_len else batch
    return row_layout(lengths, zigzag, rows), values, rows > 1


def _global_mask(
    attn_mask: torch.Tensor | list[torch.Tensor] | None,
    layout: SequenceLayout,
    place: _Place,
    documents: _Documents | None,
) -> torch.Tensor | None:
    """The mask of the whole sequence, (S, S) or (b, 1, S, S), or None if it is just causal."""
    if attn_mask is None:
        return None
    seq_len = layout.seq_len
    mask = attn_mask
    if isinstance(mask, torch.Tensor):
        mask = mask.bool() if mask.dtype == torch.uint8 else mask
        if (place.causal or documents) and _is_causal(mask, seq_len):
            return None
    if documents:
        raise ValueError(
            "attn_mask cannot be combined with packed_seq_params, which describe the mask already; leave one out."
        )
    if not isinstance(mask, torch.Tensor):
        return _mask_of_blocks(mask, layout, place.rank)
    if mask.shape[-2:] != (seq_len, seq_len):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)} and must cover the whole sequence, ({seq_len}, "
            f"{seq_len}) or (batch, 1, {seq_len}, {seq_len}), or be a list of one block per rank."
        )
    return mask


def _is_causal(mask: torch.Tensor, seq_len: int) -> bool:
    """Whether a mask is just causal; MindSpeed's compressed triangle represents any longer sequence."""
    if tuple(mask.shape) == COMPRESSED and seq_len > COMPRESSED[0]:
        return True
    return mask.dim() == 2 and torch.equal(mask, torch.ones_like(mask).triu(1))


def _mask_of_blocks(blocks: list[torch.Tensor], layout: SequenceLayout, rank: int) -> torch.Tensor:
    """Make a mask from one block per rank: this rank's queries against that rank's keys. Other rows are never read."""
    size, seq_len = layout.ring_size, layout.seq_len
    expected = [(layout.length(rank), layout.length(source)) for source in range(size)]
    if [tuple(block.shape[-2:]) for block in blocks] != expected:
        raise ValueError(
            f"attn_mask holds blocks of {[tuple(block.shape) for block in blocks]} and must hold one per "
            f"rank, of {expected}."
        )
    blocks = [block.bool() for block in blocks]
    mask = blocks[0].new_zeros((*blocks[0].shape[:-2], seq_len, seq_len))
    mine = layout.positions(rank, mask.device)
    for source, block in enumerate(blocks):
        mask[..., mine[:, None], layout.positions(source, mask.device)] = block
    return mask
