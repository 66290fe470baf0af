"""``context_parallel_attention``: the public entry; checks its arguments and assembles the call."""

from functools import lru_cache

import torch

from mindspeed_cp.algorithms import ALGORITHMS
from mindspeed_cp.algorithms.function import AttentionCall, ContextParallelAttention
from mindspeed_cp.algorithms.ring import RingProblem
from mindspeed_cp.algorithms.ulysses import UlyssesProblem
from mindspeed_cp.blocks import IntervalMask
from mindspeed_cp.comm.all_to_all import SequenceExchange
from mindspeed_cp.kernels import merge_function, select_kernel
from mindspeed_cp.kernels.base import KernelOptions

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def context_parallel_attention(
    query,
    key,
    value,
    *,
    config,
    groups,
    layout,
    softmax_scale=None,
    attention_mask=None,
    cu_seqlens=None,
    dropout_p=0.0,
    layer_number=1,
    kernel=None,
    sliding_window=None,
    softmax_offset=None,
    fused_update=False,
):
    """Attention over a sequence that is split over the ranks of a context-parallel group; every rank of it calls this.

    Args:
        query: (seq_local, batch, heads, dk); seq_local is layout.length(cp_rank).
        key: (seq_local, batch, kv_heads, dk); heads % kv_heads == 0.
        value: (seq_local, batch, kv_heads, dv); dv may differ from dk.
        config: ContextParallelConfig; groups: ContextParallelGroups; layout: SequenceLayout, all of the same
        configuration. softmax_scale: None is dk ** -0.5.
        attention_mask: bool, True = masked out, global (S, S) or (batch, 1, S, S); applies on top of the causal mask of
            ``config``, of documents and of the window. A row that sees no key gives 0.
        cu_seqlens: int32 tensor or sequence of ints, document boundaries with the leading 0 and the total; attention
            never crosses one.
        dropout_p: probability with which attention weights are dropped.
        layer_number: global, 1-based; decides where the KV cache policy applies.
        kernel: an AttentionKernel, or its name; None chooses by device.
        sliding_window: (left, right): the query at p sees keys p - left to p + right; None or -1 is unlimited.
        softmax_offset: (heads,) one more logit per head with value 0 (an attention sink); gets a gradient.
        fused_update: merge blocks by the kernel's own operator where it has one (--use-fused-ring-attention-update).

    Returns:
        (seq_local, batch, heads, dv) in the query's dtype; float64, float32, float16 and bfloat16.

    Raises:
        ValueError: an argument does not fit the others; the message says which, why and what would.
    """
    _check_tensors(query, key, value, groups, layout)
    _check_same_hierarchy(config, groups, layout)
    if config.allgather_kv and key.shape[2] != 1:
        raise ValueError(
            f"--use-ulysses-allgather-kv needs one KV head on each rank, not {key.shape[2]}; leave it out."
        )
    mask = interval_mask(config.attention_mask_type, layout.seq_len, cu_seqlens, sliding_window)
    _check_offset(softmax_offset, query)
    if not isinstance(layer_number, int) or layer_number < 1:
        raise ValueError(
            f"layer_number {layer_number} must be a whole number of at least 1; it is global and counts from 1."
        )
    policy = config.kv_cache_policy_for(layer_number)
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p {dropout_p} must lie between 0 and 1.")
    if kernel is None or isinstance(kernel, str):
        kernel = select_kernel(kernel, query.device.type)
    # Kernels take any strides but the last dimension's; torch's CPU operator would read past it without a word.
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))):
        policy = None  # nothing will run backward, so nothing is kept for it
    ring = RingProblem(
        groups=groups,
        runs=tuple(layout.ring_runs(rank) for rank in range(layout.ring_size)),
        mask=mask,
        kernel=kernel,
        options=KernelOptions(
            query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, float(dropout_p), groups.cp_rank
        ),
        exchange="direct" if config.kv_exchange == "direct" else ALGORITHMS[config.algorithm].exchange or "ring",
        policy=policy if config.ring_size > 1 else None,
        overlap=config.send_recv_overlap,
        dense_mask=_dense_mask(attention_mask, query.shape[1], layout.seq_len),
        merge=merge_function(kernel, fused_update),
    )
    return ContextParallelAttention.apply(
        query,
        key,
        value,
        softmax_offset,
        AttentionCall(ring, _ulysses_problem(config, groups, layout, query, key, value, policy, kernel)),
    )


def _ulysses_problem(config, groups, layout, query, key, value, policy, kernel):
    if config.hierarchy[0] == 1:
        return None
    unpack = "heads" if getattr(kernel, "contiguous_heads", False) else None
    exchange = SequenceExchange(
        groups.ulysses_group,
        groups.ulysses_rank,
        tuple(layout.ulysses_lengths(groups.ring_rank)),
        groups.workspace,
        config.alltoall,
        groups.host,
        unpack,
    )
    return UlyssesProblem(
        exchange,
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
        policy=policy if config.ring_size == 1 else None,
        allgather_kv=config.allgather_kv,
    )


def interval_mask(mask_type, seq_len, cu_seqlens=None, sliding_window=None):
    """The IntervalMask of a mask type ("causal" or "full"), document boundaries and a (left, right) window.

    Raises:
        ValueError: cu_seqlens does not start with 0, descends, or does not end with ``seq_len``; the window is
            malformed.
    """
    window = (None, None) if sliding_window is None else sliding_window
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or any(side is not None and (not isinstance(side, int) or side < -1) for side in window)
    ):
        raise ValueError(
            f"sliding_window {sliding_window} must be two whole numbers of at least 0, or -1 or None for no limit."
        )
    left, right = (None if side in (None, -1) else side for side in window)
    return _interval_mask(mask_type == "causal", seq_len, left, right, _boundaries(cu_seqlens))


@lru_cache(maxsize=256)
def _interval_mask(causal, seq_len, left, right, cu_seqlens):
    if cu_seqlens is not None:
        if len(cu_seqlens) < 2 or cu_seqlens[0] != 0:
            raise ValueError(
                f"cu_seqlens {_short(cu_seqlens)} must start with 0 and hold at least one document; "
                "prepend the leading 0."
            )
        if any(after < before for before, after in zip(cu_seqlens, cu_seqlens[1:])):
            raise ValueError(f"cu_seqlens {_short(cu_seqlens)} must not descend; pass cumulative document lengths.")
        if cu_seqlens[-1] != seq_len:
            raise ValueError(
                f"cu_seqlens ends with {cu_seqlens[-1]} and must end with the sequence length {seq_len}; "
                "add a last document for the padding, or build the layout for the documents' total."
            )
        # Empty documents hold no token; a single one is no boundary at all.
        cu_seqlens = tuple(dict.fromkeys(cu_seqlens))
        cu_seqlens = None if len(cu_seqlens) == 2 else cu_seqlens
    if left is not None and left >= seq_len - 1:
        left = None
    if right is not None and right >= seq_len - 1 > 0:
        right = None
    return IntervalMask(left, 0 if causal else right, cu_seqlens)


def _boundaries(cu_seqlens):
    if cu_seqlens is None:
        return None
    numbers = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    if not isinstance(numbers, (tuple, list)) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(
            f"cu_seqlens {cu_seqlens} must be one row of whole numbers: the document boundaries from 0 to the total."
        )
    return tuple(numbers)


def _short(numbers):
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def _dense_mask(attention_mask, batch, seq_len):
    """(S, S) or (batch, 1, S, S) -> (1 or batch, S, S)."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask has dtype {attention_mask.dtype} and must be bool, True = masked out; compare it first."
        )
    if shape == (seq_len, seq_len):
        return attention_mask[None]
    if shape not in ((batch, 1, seq_len, seq_len), (1, 1, seq_len, seq_len)):
        raise ValueError(
            f"attention_mask has shape {shape} and must be the mask of the whole sequence, ({seq_len}, {seq_len}) "
            f"or ({batch}, 1, {seq_len}, {seq_len}); do not split it over the ranks."
        )
    return attention_mask[:, 0]


def _check_offset(softmax_offset, query):
    if softmax_offset is not None and tuple(softmax_offset.shape) != (query.shape[2],):
        raise ValueError(
            f"softmax_offset has shape {tuple(softmax_offset.shape)} and must be ({query.shape[2]},), one logit for "
            "each query head of this rank."
        )


def _check_same_hierarchy(config, groups, layout):
    wanted = (config.hierarchy[0], config.ring_size)
    if (layout.ulysses_degree, layout.ring_size) != wanted or groups.hierarchy != config.hierarchy:
        raise ValueError(
            f"config has hierarchy {config.hierarchy} (ulysses, window, windows), groups {groups.hierarchy} and "
            f"layout ({layout.ulysses_degree}, ring {layout.ring_size}); build groups and layout from the same "
            "config."
        )


def _check_tensors(query, key, value, groups, layout):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and must be (seq_local, batch, heads, head_dim).")
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; query, key and value must share one of float64, float32, "
                "float16, bfloat16."
            )
    expected = layout.length(groups.cp_rank)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[0] != expected:
            raise ValueError(
                f"{name} has {tensor.shape[0]} tokens on rank {groups.cp_rank}, the layout of {layout.seq_len} "
                f"tokens gives it {expected}; slice with layout.shard(tensor, cp_rank)."
            )
    heads, kv_heads = query.shape[2], key.shape[2]
    if key.shape[2] != value.shape[2] or key.shape[1] != query.shape[1] or value.shape[1] != query.shape[1]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same heads, and the batch of "
            f"query {tuple(query.shape)}."
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads, which must be a multiple of the {kv_heads} KV heads; "
            f"choose a divisor of {heads} for the KV heads (--num-query-groups)."
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key has head dimension {key.shape[3]} and query {query.shape[3]}; they must be equal (only value "
            "may differ)."
        )
