"""``context_parallel_attention``, the public entry point: checks its arguments and assembles the call."""

from collections.abc import Sequence

import torch

from mindspeed_cp.attention.exchange_choice import exchange_for, sends_latents, steps_in_flight
from mindspeed_cp.attention.expansion import Expansion, expanded
from mindspeed_cp.attention.function import AttentionCall, ContextParallelAttention
from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.attention.kv_cache import KVCache
from mindspeed_cp.attention.merging import merge_function, plain_merge
from mindspeed_cp.attention.ring import RingProblem
from mindspeed_cp.attention.ulysses import UlyssesProblem
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.sequence_exchange import SequenceExchange
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionKernel, KernelOptions, MemoryOrder
from mindspeed_cp.sequence.cache import kept_up_to
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.masks import GivenSlices, attention_masks, dense_mask
from mindspeed_cp.sequence.runs import positions
from mindspeed_cp.settings.config import ContextParallelConfig

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def context_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    config: ContextParallelConfig,
    groups: ContextParallelGroups,
    layout: SequenceLayout,
    softmax_scale: float | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    dropout_p: float = 0.0,
    layer_number: int = 1,
    kernel: AttentionKernel | str | None = None,
    sliding_window: tuple[int | None, int | None] | None = None,
    softmax_offset: torch.Tensor | None = None,
    fused_update: bool = False,
    kept: KeptAttention | None = None,
    expand: Expansion | None = None,
    attention_slices: GivenSlices = None,
) -> torch.Tensor:
    """Attention over a sequence that is split over the ranks of a context-parallel group; all its ranks call this.

    Args:
        query: (seq_local, batch, heads, dk); seq_local is layout.length(cp_rank), in the order of layout.positions.
        key: (seq_local, batch, kv_heads, dk); heads % kv_heads == 0.
        value: (seq_local, batch, kv_heads, dv); dv may differ from dk.
        config, groups, layout: of the same configuration; the layout may be any partition of the positions. Where
            layers have settings of their own (``config.layer_algorithms``), ``layer_number`` says which.
        softmax_scale: None is dk ** -0.5.
        attention_mask: bool, True = masked out, global (S, S) or (batch, 1, S, S); applies in addition to documents and
            window, and to the causal mask if the mask type is "causal", the default. So a prefix or custom mask whose
            queries see later keys needs mask type "general" or "full": with "causal" those keys stay hidden. (In
            Megatron the batch's mask overrides the type.) A row that sees no key gives 0.
        cu_seqlens: int32 tensor or ints, document boundaries with the leading 0 and the total; attention never crosses
            one. A sequence of those, one for each row of the batch, where rows hold different documents.
        dropout_p: probability with which attention weights are dropped; 1 leaves 0.
        layer_number: global, 1-based; says where the KV cache policy applies, and which settings are the layer's own.
        kernel: an AttentionKernel, or its name; None chooses by device.
        sliding_window: (left, right): the query at p sees keys p - left to p + right; None or -1 is unlimited.
        softmax_offset: (heads,) additional logit per head whose value vector is 0 (an attention sink); gets a gradient.
        fused_update: merge blocks by the kernel's own operator if it has one (--use-fused-ring-attention-update).
        kept: KeptAttention of the checkpoint around this call; recomputation reuses the results of the first pass.
        expand: computes keys and values from ``key`` and ``value``, which then have one head each of its ``widths``,
            such as the latent of multi-latent attention (LatentExpansion). Either these or the computed keys and values
            are sent (``config.mla_exchange``); its parameters get the gradient of this rank's queries.
        attention_slices: ((first query, last + 1), (first key, last + 1), kind) of global positions, which together
            define what queries see, for every mask type: no other pair is visible, and a query in no slice gives 0. A
            window, documents and a dense mask can hide more. One list for all rows of the batch, or one for each. Kinds
            (rows are queries, x is visible)::

                full      causal    inverse   band
                x x x x   x x . .   x x x x   x x . .
                x x x x   x x x .   . x x x   . x x .
                x x x x   x x x x   . . x x   . . x x

            causal ends in the lower right corner (MagiAttention's CAUSAL): the last query sees every key, and each
            earlier one sees one key less. inverse begins in the upper left corner (INVCAUSAL): the first query sees
            every key, and each later one begins one key later. band is both (BICAUSAL), and empty if there are more
            queries than keys.

    Returns:
        (seq_local, batch, heads, dv) in the query's dtype; float64, float32, float16 and bfloat16.

    Raises:
        ValueError: an argument does not fit the others; the message says which, why, and what would fit.
    """
    _check_layer(layer_number)
    if config.entries:
        config = config.of_layer(layer_number)
        groups, layout = groups.of(config), layout.of_degree(config.hierarchy[0])
    _check_tensors(query, key, value, groups, layout)
    if expand is None:
        _check_heads(query, key, value)
    else:
        _check_expansion(query, key, value, expand)
        if not sends_latents(config, expand, groups.topology, query.element_size()):
            (key, value), expand = expanded(key, value, expand), None
    parameters = () if expand is None else expand.parameters
    _check_same_hierarchy(config, groups, layout)
    _check_options(config, query, key, softmax_offset, dropout_p)
    if dropout_p == 1:
        kernel = "blockwise"  # fused kernels divide by the keep probability, which is 0
    chosen = select_kernel(kernel, query.device.type) if kernel is None or isinstance(kernel, str) else kernel
    causal = config.causal and not (config.attention_mask_type == "general" and attention_mask is not None)
    masks = attention_masks(causal, layout.seq_len, query.shape[1], cu_seqlens, sliding_window, attention_slices)
    policy = config.kv_cache_policy_for(layer_number)
    differentiates = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value, *parameters)
    )
    has_backward = differentiates or (kept is not None and kept.is_active)
    if not has_backward:
        policy = None  # there is no backward pass, so nothing is kept for it
    cache = KVCache.resolve(policy, config.ring_size)
    order, merge = chosen.memory_order(query.dtype), merge_function(chosen, fused_update)
    exchange = exchange_for(config, groups, layout, masks, attention_mask is not None)
    ring = RingProblem(
        groups=groups,
        layout=layout,
        masks=masks,
        kernel=chosen,
        options=KernelOptions(
            query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            float(dropout_p),
            groups.cp_rank,
            fused_merge=merge is not plain_merge,
        ),
        exchange=exchange,
        keep=cache.keep,
        overlap=config.send_recv_overlap,
        dense_mask=dense_mask(attention_mask, query.shape[1], layout.seq_len),
        merge=merge,
        order=order,
        in_flight=steps_in_flight(config, exchange, groups.topology),
    )
    dv = value.shape[3] if expand is None else expand.dv
    ulysses = _ulysses_problem(config, groups, layout, query, key, value, dv, cache, order)
    call = AttentionCall(ring, ulysses, layer_number, has_backward, kept, expand)
    # Kernels accept any strides except in the last dimension; torch's CPU operator would silently read wrong elements.
    tensors = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)]
    places = None if layout.ulysses_degree > 1 else _ascending(layout, groups.cp_rank, query.device)
    if places is not None:
        ascending = places.argsort()
        tensors = [tensor[ascending] for tensor in tensors]
    out: torch.Tensor = ContextParallelAttention.apply(*tensors, softmax_offset, call, *parameters)
    return out if places is None else out[places]


def _ascending(layout: SequenceLayout, cp_rank: int, device: torch.device) -> torch.Tensor | None:
    """(seq_local,) index of each of this rank's tokens in their ascending order; None if they already ascend.

    Blocks are planned over ascending positions. With a Ulysses group the exchange orders the rows.
    """
    return None if len(layout.ulysses_rows(cp_rank)[0]) <= 1 else _places(layout, cp_rank, device)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


@kept_up_to(32 << 20, _num_bytes)
def _places(layout: SequenceLayout, cp_rank: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # an index made during inference could not be used in training
        return positions(layout.ulysses_rows(cp_rank)[0], device)


def _ulysses_problem(
    config: ContextParallelConfig,
    groups: ContextParallelGroups,
    layout: SequenceLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dv: int,
    cache: KVCache,
    order: MemoryOrder | None,
) -> UlyssesProblem | None:
    if groups.ulysses is None:
        return None
    exchange = SequenceExchange(groups.ulysses, layout.ulysses_rows(groups.ring_rank), config.alltoall, order)
    return UlyssesProblem(
        exchange,
        query.shape[2],
        key.shape[2],
        query.shape[3],
        dv,
        key.shape[3],
        value.shape[3],
        refetch=cache.refetch,
        allgather_kv=config.allgather_kv,
        num_groups=_num_groups(config, query.shape[2]),
    )


def _num_groups(config: ContextParallelConfig, heads: int) -> int:
    of_rank = -(-heads // config.hierarchy[0])
    if config.ulysses_chunks > of_rank:
        raise ValueError(
            f"--cp-ulysses-chunks {config.ulysses_chunks} must be at most the {of_rank} heads that a rank computes; "
            f"use --cp-ulysses-chunks {of_rank} or less."
        )
    return config.ulysses_chunks


def _check_layer(layer_number: int) -> None:
    if not isinstance(layer_number, int) or layer_number < 1:
        raise ValueError(
            f"layer_number {layer_number} must be a whole number of at least 1; it is global and counts from 1."
        )


def _check_options(
    config: ContextParallelConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    softmax_offset: torch.Tensor | None,
    dropout_p: float,
) -> None:
    if config.allgather_kv and key.shape[2] != 1:
        raise ValueError(
            f"--use-ulysses-allgather-kv needs one KV head on each rank, not {key.shape[2]}; leave it out."
        )
    if softmax_offset is not None and tuple(softmax_offset.shape) != (query.shape[2],):
        raise ValueError(
            f"softmax_offset has shape {tuple(softmax_offset.shape)} and must be ({query.shape[2]},), one logit for "
            "each query head of this rank."
        )
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p {dropout_p} must lie between 0 and 1.")


def _check_same_hierarchy(config: ContextParallelConfig, groups: ContextParallelGroups, layout: SequenceLayout) -> None:
    wanted = (config.hierarchy[0], config.ring_size)
    if (layout.ulysses_degree, layout.ring_size) != wanted or groups.hierarchy != config.hierarchy:
        raise ValueError(
            f"config has hierarchy {config.hierarchy} (ulysses, window, windows), groups {groups.hierarchy} and "
            f"layout ({layout.ulysses_degree}, ring {layout.ring_size}); build groups and layout from the same "
            "config."
        )


def _way_to_length(name: str, tensor: torch.Tensor, expected: int, seq_len: int) -> str:
    """Return the remedy for a tensor whose first dimension is not the rank's tokens."""
    orders = (("(batch, seq, heads, head_dim)", (1, 0, 2, 3)), ("(batch, heads, seq, head_dim)", (2, 0, 1, 3)))
    for order, moved in orders if tensor.shape[0] != seq_len else ():
        if tensor.shape[moved[0]] == expected:
            return f"{name} looks like {order}, and tensors are sequence-first here: pass {name}.permute{moved}"
    return "slice with layout.shard(tensor, cp_rank)"


def _check_tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: ContextParallelGroups,
    layout: SequenceLayout,
) -> None:
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
                f"tokens gives it {expected}; {_way_to_length(name, tensor, expected, layout.seq_len)}."
            )


def _check_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
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


def _check_expansion(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, expand: Expansion) -> None:
    batch = query.shape[1]
    wanted = [(batch, 1, width) for width in expand.widths]
    if [tuple(tensor.shape[1:]) for tensor in (key, value)] != wanted:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} are what expand reads, and must be "
            f"(seq_local, {batch}, 1, {expand.widths[0]}) and (seq_local, {batch}, 1, {expand.widths[1]}); pass what "
            "should travel, or leave out expand."
        )
    if query.shape[3] != expand.dk or not expand.kv_heads or query.shape[2] % expand.kv_heads:
        raise ValueError(
            f"expand makes keys of {expand.kv_heads} heads with {expand.dk} elements, and query {tuple(query.shape)} "
            f"needs keys of {query.shape[3]} elements, in a divisor of its {query.shape[2]} heads; "
            "build expand with the sizes of the same module."
        )
    for parameter in expand.parameters:
        if parameter.dtype != query.dtype or parameter.device != query.device:
            raise ValueError(
                f"a parameter of expand is {parameter.dtype} on {parameter.device}, and query is {query.dtype} on "
                f"{query.device}; convert one of them."
            )
