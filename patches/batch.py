"""Patches of how Megatron splits a batch over the context-parallel ranks; batches that others split."""

import importlib
import inspect
from functools import wraps
from types import SimpleNamespace

import torch
import torch.distributed as dist
from mindspeed_cp.patches.dynamic import refuse_dynamic, split_sub_batch
from mindspeed_cp.patches.manager import Patch

from mindspeed_cp.megatron.documents import documents_of_position_ids, documents_of_tokens
from mindspeed_cp.megatron.records import Documents, MicroBatch
from mindspeed_cp.sequence.sharding import SEQUENCES, WHOLE
from mindspeed_cp.settings.notices import warn_rank0

UTILS = "megatron.core.utils"


def batch_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{UTILS}.get_batch_on_this_cp_rank",
            _slice_batch(state),
            "a rank gets the tokens of the chosen layout; any length, the dense mask stays whole",
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


def split_batch(batch, state, documents: Documents | None = None):
    """Replace every sequence of ``batch`` by the part of this rank, in place, and record how the batch was split.

    Args:
        batch: dict of (b, S) tensors, None, and an optional attention_mask (b, 1, S, S), which stays whole: attention
            takes its rows and columns through the layout.
        documents: boundaries that the caller knows; None looks for them where the settings say.
    """
    sequences = _sequences(batch)
    if not sequences:
        return batch
    documents = documents_of_batch(batch, state) if documents is None else documents
    record = MicroBatch(state.layout(length_of(sequences), documents), documents)
    for name, value in sequences.items():
        batch[name] = record.layout.shard(value, state.cp_rank, dim=1).contiguous()
    state.records.remember((batch[name] for name in sequences), record)
    return batch


def _sequences(batch):
    """The (b, S, ...) tensors of Megatron's own batch: those known by name, and others that are as long, said aloud."""
    named = named_sequences(batch)
    others = {
        name: value
        for name, value in batch.items()
        if name not in WHOLE and name not in named and _may_be_sequence(value)
    }
    if named:
        length = length_of(named)
        others = {name: value for name, value in others.items() if value.size(1) == length}
    if others:
        warn_rank0(
            f"{', '.join(sorted(others))}: not known by name, and split over the context-parallel ranks because of a "
            "length like that of the sequence, as Megatron does; take out of the batch what describes it as a whole."
        )
    return named | others


def _may_be_sequence(value):
    return isinstance(value, torch.Tensor) and value.dim() >= 2


def named_sequences(batch, sequences=()):
    """The (b, S, ...) tensors that a batch of some framework calls by the names of sequences."""
    named = SEQUENCES.union(sequences)
    return {name: value for name, value in batch.items() if name in named and _may_be_sequence(value)}


def length_of(sequences) -> int:
    """The one length of these (b, S, ...) tensors; name -> tensor."""
    lengths = {name: value.size(1) for name, value in sequences.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "the batch holds sequences of different lengths on dimension 1: "
            f"{', '.join(f'{name} {length}' for name, length in lengths.items())}; pad them to one length."
        )
    if not lengths:
        raise ValueError(f"the batch holds no sequence; name one of {', '.join(sorted(SEQUENCES))}.")
    return next(iter(lengths.values()))


def documents_of_batch(batch, state) -> Documents | None:
    """Where the documents of a whole batch end: as handed over for it, else by what the settings say; None when a mask
    in the batch says it.
    """
    if state.handed.waiting:
        sequences = named_sequences(batch)
        if not sequences:
            return None
        state.documents_by_hand = True
        return state.handed.take(len(next(iter(sequences.values()))), length_of(sequences))
    if batch.get("attention_mask") is not None:
        return None
    if state.documents_from_position_ids and batch.get("position_ids") is not None:
        return documents_of_position_ids(batch["position_ids"])
    tokens = batch.get("tokens", batch.get("input_ids"))
    if state.end_of_document is not None and tokens is not None:
        ends = state.end_of_document
        return documents_of_tokens(tokens, ends() if callable(ends) else ends)
    return None


def _slice_batch(state):
    def build(original):
        signature = inspect.signature(original)

        def split(batch, is_hybrid=False):
            return split_batch(batch, state, _documents_that_come_along(batch, state, is_hybrid))

        @wraps(original)
        def get_batch_on_this_cp_rank(batch, *args, **kwargs):
            given = signature.bind_partial(batch, *args, **kwargs).arguments
            if "is_hybrid_cp" in signature.parameters and "is_hybrid_cp" not in given:
                # Code written for a Megatron before 0.18 does not say it, and leaves the group to Megatron.
                kwargs["is_hybrid_cp"] = False
                if given.get("cp_group") is None and dist.is_initialized():
                    kwargs["cp_group"] = _own_group()
            group = given.get("cp_group")
            if state.sizes:
                return split_sub_batch(batch, state, given, split)
            if state.cp_size == 1 or (isinstance(group, dist.ProcessGroup) and group.size() != state.cp_size):
                return original(batch, *args, **kwargs)
            return split(batch, given.get("is_hybrid_cp"))

        return get_batch_on_this_cp_rank

    return build


def _own_group():
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def _documents_that_come_along(batch, state, is_hybrid) -> Documents | None:
    """The documents of a batch that brings cu_seqlens (1, n), as those of 0.18 and later do; None without.

    Raises:
        ValueError: dynamic context parallelism of which initialize_model_parallel knows nothing; or several rows.
    """
    if is_hybrid:
        refuse_dynamic("initialize_model_parallel was not told so (hybrid_context_parallel=True)")
    ends, padded = batch.get("cu_seqlens"), batch.get("cu_seqlens_padded")
    if ends is None:
        return None
    sequences = named_sequences(batch)
    if not sequences:
        return None  # a stage in the middle of a pipeline
    if ends.dim() > 1 and ends.size(0) > 1:
        raise ValueError(
            f"cu_seqlens of the batch has shape {tuple(ends.shape)}, and a packed batch is one row; use "
            "--micro-batch-size 1."
        )
    params = SimpleNamespace(cu_seqlens_q=ends, cu_seqlens_q_padded=padded)
    return (state.boundaries.documents(params, length_of(sequences)),)


def _slice_packed_batch(state):
    def build(original):
        @wraps(original)
        def get_thd_batch_on_this_cp_rank(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size=None, cp_rank=None):
            if state.cp_size == 1 or cp_size not in (None, state.cp_size):
                return original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size, cp_rank)
            # Given as one rank, Megatron makes the parameters and splits nothing.
            batch, params = original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, 1, 0)
            documents = (state.boundaries.documents(params, length_of(named_sequences(batch))),)
            return split_batch(batch, state, documents), params

        return get_thd_batch_on_this_cp_rank

    return build
