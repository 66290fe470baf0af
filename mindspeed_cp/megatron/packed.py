"""Records of packed batches (thd) that this project, or a framework, has split.

Megatron, Transformer Engine, verl and ms-swift split packed documents in the same way: each is padded to a multiple of
2 * cp tokens and split as a separate zigzag, and a rank holds its parts document by document (layout
``document_zigzag``). A thd batch without a record is assumed to be split like that; its position ids, if any, are
compared with it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_cp.megatron.foreign import of_kind
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.megatron.sizes import check_local_size
from mindspeed_cp.megatron.splitting import built
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.notices import warn_rank0

if TYPE_CHECKING:
    from mindspeed_cp.megatron.known import Known as Adaptor

WAY_OUT = (
    "split packed batches as Megatron does, each document padded to a multiple of 2 x cp tokens and zigzag on its own, "
    "or split whole batches with state().shard_batch(batch, cu_seqlens=...), which needs no padding"
)


def packed_batch(
    adaptor: "Adaptor",
    scope: Scope,
    params: Any,
    local_len: int | None,
    position_ids: torch.Tensor | None = None,
    record: MicroBatch | None = None,
) -> MicroBatch:
    """The record of a packed batch.

    Args:
        params: PackedSeqParams in thd.
        local_len: tokens that this rank holds, None if not yet known (a later pipeline stage).
        position_ids: (1, local_len) of this rank, checked if given.
        record: the record of the split, if this project split the batch.

    Raises:
        ValueError: the batch is inconsistent or fits no known layout; the message names a way out.
    """
    boundaries = adaptor.boundaries
    check_local_size(params, scope.size)
    if scope.alone and (record is None or record.slices is None):
        assert local_len is not None
        return MicroBatch(built(scope.config, local_len), (boundaries.documents(params, local_len),), scope)
    if record is not None:
        documents = (boundaries.documents(params, record.seq_len),)
        if documents[0][-1] != record.seq_len:
            raise ValueError(
                f"cu_seqlens of the packed batch end at {documents[0][-1]}, and a sequence of {record.seq_len} tokens "
                "was split; pass the boundaries of the batch that was split."
            )
        return record if record.documents == documents else replace(record, documents=documents)
    padded, documents = boundaries.padded(params), (boundaries.documents(params),)
    if position_ids is not None and local_len is not None and position_ids.numel() == local_len:
        layout = adaptor.foreign.packed(scope, position_ids, padded, documents[0], _contract(adaptor, scope))
    else:
        layout = layout_of_contract(adaptor, scope, padded, local_len)
    return MicroBatch(layout, documents, scope)


def _contract(adaptor: "Adaptor", scope: Scope) -> str:
    """How packed documents of others are split: as declared, else each document as a zigzag."""
    if scope.config.batch_layout != "auto":
        return scope.config.batch_layout
    if adaptor.settings.declared == "contiguous":
        return "contiguous"
    warn_rank0(
        "packed batches arrive split already: each document is assumed to be zigzag over 2 x cp chunks, as "
        "Megatron splits it (document_zigzag); --cp-batch-layout names another layout."
    )
    return "document_zigzag"


def layout_of_contract(
    adaptor: "Adaptor", scope: Scope, padded: tuple[int, ...], local_len: int | None
) -> SequenceLayout:
    """The layout of packed documents of others, whose boundaries include padding.

    Raises:
        ValueError: a document cannot be split like that, or this rank holds another number of tokens.
    """
    kind, chunks = _contract(adaptor, scope), 2 * scope.size
    for index, (start, stop) in enumerate(zip(padded, padded[1:])):
        if kind == "document_zigzag" and (stop - start) % chunks:
            raise ValueError(
                f"document {index} of a packed batch has {stop - start} tokens from {start} to {stop}, and a batch "
                f"that arrives split in the layout document_zigzag has multiples of 2 x --context-parallel-size = "
                f"{chunks} (cu_seqlens_q_padded); {WAY_OUT}."
            )
    layout = of_kind(scope.config, kind, padded[-1], padded)
    if local_len is not None and local_len != layout.length(scope.rank):
        raise ValueError(
            f"context-parallel rank {scope.rank} holds {local_len} packed tokens, and cu_seqlens that end at "
            f"{padded[-1]} give it {layout.length(scope.rank)} in the layout {layout.kind}; {WAY_OUT}."
        )
    return layout
