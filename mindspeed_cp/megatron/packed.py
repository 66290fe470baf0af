"""Packed batches (thd): the record of one that this project split, or that a framework split before it came here.

Megatron, Transformer Engine, verl and ms-swift split packed documents alike: each is padded to a multiple of 2 * cp
tokens and is zigzag on its own, and a rank holds its parts document by document (layout ``document_zigzag``). That is
what a thd batch without a record is taken for, after everything that can be checked has been checked.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.patches.dynamic import check_local_size
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import warn_rank0

WAY_OUT = (
    "split packed batches as Megatron does, each document padded to a multiple of 2 x cp tokens and zigzag on its own, "
    "or split whole batches with state().shard_batch(batch, cu_seqlens=...), which needs no padding"
)


def packed_batch(
    state, params, local_len: int | None, position_ids: torch.Tensor | None = None, record: MicroBatch | None = None
) -> MicroBatch:
    """The record of a packed batch.

    Args:
        params: PackedSeqParams in thd.
        local_len: tokens that this rank holds, None where it holds none yet (a later pipeline stage).
        position_ids: (1, local_len) of this rank, checked where they are given.
        record: of the split, where this project made it.

    Raises:
        ValueError: the batch contradicts itself, or no layout that is known; the message names a way out.
    """
    check_local_size(params, state.cp_size)
    if state.cp_size == 1:
        return MicroBatch(state.layout(local_len), (state.boundaries.documents(params, local_len),))
    if record is not None:
        documents = (state.boundaries.documents(params, record.seq_len),)
        if documents[0][-1] != record.seq_len:
            raise ValueError(
                f"cu_seqlens of the packed batch end at {documents[0][-1]}, and a sequence of {record.seq_len} tokens "
                "was split; pass the boundaries of the batch that was split."
            )
        return record if record.documents == documents else replace(record, documents=documents)
    return _split_elsewhere(state, params, local_len, position_ids)


def layout_of_packed(state, boundaries: tuple[int, ...], local_len: int) -> SequenceLayout:
    """The layout of the packed batch that runs, of which only its padded boundaries are known here."""
    if state.active is not None:
        return state.active.layout
    return _checked_layout(state, boundaries, local_len)


def _checked_layout(state, padded, local_len):
    """The layout of a packed batch that somebody else split."""
    config = state.config if state.config.batch_layout != "auto" else _document_zigzag(state.config)
    layout = _layout(config, padded)
    if local_len is not None and local_len != layout.length(state.cp_rank):
        raise ValueError(
            f"context-parallel rank {state.cp_rank} holds {local_len} packed tokens, and cu_seqlens that end at "
            f"{padded[-1]} give it {layout.length(state.cp_rank)} in the layout {layout.kind}; {WAY_OUT}."
        )
    return layout


def _split_elsewhere(state, params, local_len, position_ids):
    padded = state.boundaries.padded(params)
    if state.config.batch_layout == "auto":
        warn_rank0(
            "packed batches arrive split already: each document is taken to be zigzag over 2 x cp chunks, as "
            "Megatron splits it (document_zigzag); --cp-batch-layout names another layout."
        )
    layout = _checked_layout(state, padded, local_len)
    record = MicroBatch(layout, (state.boundaries.documents(params),))
    if position_ids is not None and position_ids.shape == (1, layout.length(state.cp_rank)):
        _check_positions(layout.positions(state.cp_rank), position_ids[0].cpu(), padded, record.documents[0])
    return record


@lru_cache(maxsize=8)
def _document_zigzag(config: ContextParallelConfig) -> ContextParallelConfig:
    return replace(config, batch_layout="document_zigzag")


@lru_cache(maxsize=256)
def _layout(config, padded):
    chunks = 2 * config.context_parallel_size
    for index, (start, stop) in enumerate(zip(padded, padded[1:])):
        if config.batch_layout == "document_zigzag" and (stop - start) % chunks:
            raise ValueError(
                f"document {index} of a packed batch has {stop - start} tokens from {start} to {stop}, and a batch "
                f"that arrives split in the layout document_zigzag has multiples of 2 x --context-parallel-size = "
                f"{chunks} (cu_seqlens_q_padded); {WAY_OUT}."
            )
    return SequenceLayout.build(config, padded[-1], padded)


def _check_positions(positions, given, padded, documents):
    """Position ids count from the start of each document, or of the whole sequence; padding may hold anything.

    Where the boundaries do not tell padding from tokens, as with verl and ms-swift, padding holds 0: 0 says nothing.
    """
    places = places_in_documents(positions, padded)
    starts = torch.tensor(sorted(set(padded[:-1])))
    first = torch.searchsorted(starts, positions, right=True) - 1
    ends = torch.tensor(documents)[torch.searchsorted(torch.tensor(documents), starts, right=True)]
    real = positions < ends[first]
    wrong = (given != places) & (given != positions) & (given != 0) & real
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"position id {int(given[at])} of packed token {at} of this rank contradicts the layout document_zigzag, "
            f"which has place {int(places[at])} of a document there; {WAY_OUT}."
        )


def places_in_documents(positions: torch.Tensor, boundaries) -> torch.Tensor:
    """How far each global position lies from the start of its document; tokens behind the last one count on there."""
    starts = torch.tensor(sorted(set(boundaries[:-1])), device=positions.device)
    return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
