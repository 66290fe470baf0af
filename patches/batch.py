"""Patches of how Megatron splits a batch over the context-parallel ranks."""

import importlib
from functools import wraps

import torch
import torch.distributed as dist
from mindspeed_cp.patches.documents import documents_of_position_ids
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.state import BatchShape

UTILS = "megatron.core.utils"


def batch_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{UTILS}.get_batch_on_this_cp_rank",
            _slice_batch(state),
            "a rank gets the tokens of the chosen algorithm's layout; any length, the dense mask stays whole",
        ),
        Patch(
            f"{UTILS}.get_thd_batch_on_this_cp_rank",
            _slice_packed_batch(state),
            "Megatron's split of packed documents needs Transformer Engine and padding",
            _absent(UTILS, "get_thd_batch_on_this_cp_rank", "packed batches come with 0.16"),
        ),
    ]


def _absent(module, name, why):
    """() -> why when ``module`` has no ``name``."""
    return lambda: "" if hasattr(importlib.import_module(module), name) else why


def split_batch(batch, state):
    """Replace every sequence of ``batch`` by the part of this rank, in place, and record the shape of the batch.

    Args:
        batch: dict of (b, S) tensors, None, and an optional attention_mask (b, 1, S, S), which stays whole: attention
            takes its rows and columns through the layout.
    """
    sequences = {
        name: value
        for name, value in batch.items()
        if name != "attention_mask" and isinstance(value, torch.Tensor) and value.dim() >= 2
    }
    if not sequences:
        return batch
    lengths = {value.size(1) for value in sequences.values()}
    if len(lengths) > 1:
        raise ValueError(
            "the batch holds sequences of different lengths on dimension 1: "
            f"{', '.join(f'{name} {value.size(1)}' for name, value in sequences.items())}; pad them to one length."
        )
    seq_len, documents = lengths.pop(), None
    if (
        state.documents_from_position_ids
        and batch.get("attention_mask") is None
        and batch.get("position_ids") is not None
    ):
        documents = documents_of_position_ids(batch["position_ids"])
    layout = state.layout(seq_len)
    for name, value in sequences.items():
        batch[name] = layout.shard(value, state.cp_rank, dim=1).contiguous()
    state.batch = BatchShape(seq_len, documents)
    return batch


def _slice_batch(state):
    def build(original):
        @wraps(original)
        def get_batch_on_this_cp_rank(batch, *args, **kwargs):
            group = kwargs.get("cp_group", args[0] if args else None)
            if state.cp_size == 1 or (isinstance(group, dist.ProcessGroup) and group.size() != state.cp_size):
                return original(batch, *args, **kwargs)
            return split_batch(batch, state)

        return get_batch_on_this_cp_rank

    return build


def _slice_packed_batch(state):
    def build(original):
        @wraps(original)
        def get_thd_batch_on_this_cp_rank(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size=None, cp_rank=None):
            if state.cp_size == 1 or cp_size not in (None, state.cp_size):
                return original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size, cp_rank)
            # Given as one rank, Megatron makes the parameters and splits nothing.
            batch, params = original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, 1, 0)
            return split_batch(batch, state), params

        return get_thd_batch_on_this_cp_rank

    return build
