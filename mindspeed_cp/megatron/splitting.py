"""Split a whole batch: find its sequences and documents, choose its layout, and make its record."""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_cp.megatron.documents import documents_of_position_ids, documents_of_tokens
from mindspeed_cp.megatron.records import Documents, MicroBatch, Slices
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.megatron.slices import slices_of_batch
from mindspeed_cp.megatron.targets import moved
from mindspeed_cp.sequence.layout import DOCUMENT_KINDS, SequenceLayout
from mindspeed_cp.sequence.sharding import SEQUENCES, WHOLE, sequence_dim, shard_batch
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import warn_rank0

if TYPE_CHECKING:
    from mindspeed_cp.megatron.known import Known as Adaptor

Batch = Mapping[str, Any]


def layout(
    adaptor: "Adaptor", scope: Scope, seq_len: int, documents: Documents | None = None, slices: Slices | None = None
) -> SequenceLayout:
    """The layout of a scope's configuration for a sequence that this project splits.

    Raises:
        ValueError: aligned Ulysses cannot split this length, a rank would get no token, or the layout depends on
            documents, which differ between the rows of the batch.
    """
    config, setup, shared = scope.config, adaptor.setup, None
    unaligned = setup is not None and setup.unaligned
    even = not unaligned and not config.takes_any_length(None if setup is None else setup.all_layers)
    if not scope.alone and even and seq_len % config.context_parallel_size:
        raise ValueError(
            f"sequence length {seq_len} must be divisible by --context-parallel-size "
            f"{config.context_parallel_size} for aligned Ulysses; use --gather-size-calculator dynamic, which "
            "takes any length, or --context-parallel-algo megatron_cp_algo."
        )
    if config.layout_kind in DOCUMENT_KINDS:
        shared = _shared(adaptor, config, documents)
    elif documents is not None and len(documents) == 1 and not adaptor.is_pipeline:
        shared = documents[0]  # "auto" may use them
    if slices is not None and len(slices) == 1 and not adaptor.is_pipeline:
        return with_tokens_everywhere(SequenceLayout.build(config, seq_len, shared, slices[0]))
    return with_tokens_everywhere(built(config, seq_len, shared))


@lru_cache(maxsize=1024)
def built(config: ContextParallelConfig, seq_len: int, documents: tuple[int, ...] | None = None) -> SequenceLayout:
    return SequenceLayout.build(config, seq_len, documents)


def _shared(adaptor: "Adaptor", config: ContextParallelConfig, documents: Documents | None) -> tuple[int, ...] | None:
    """The documents on which a layout that was named depends, else None."""
    named = f"--cp-batch-layout {config.batch_layout} goes by documents"
    if documents is None and adaptor.settings.expects_documents and adaptor.is_pipeline:
        raise ValueError(
            f"{named}, and Megatron gives the tokens that say where they end to the first pipeline stage alone; "
            "use --cp-batch-layout auto."
        )
    if documents is not None and len(documents) > 1:
        raise ValueError(
            f"{named}, and the {len(documents)} rows of this micro-batch hold different ones; use "
            "--micro-batch-size 1, or --cp-batch-layout auto."
        )
    return None if documents is None else documents[0]


def with_tokens_everywhere(layout: SequenceLayout) -> SequenceLayout:
    """``layout``; ValueError if a rank has no tokens, because Megatron's layers cannot reshape empty tensors."""
    empty = [rank for rank in range(layout.cp_size) if not layout.length(rank)]
    if empty:
        raise ValueError(
            f"a sequence of {layout.seq_len} tokens leaves context-parallel rank {', '.join(map(str, empty))} of "
            f"{layout.cp_size} without any, and Megatron's layers need one on each; use at least {layout.cp_size} "
            "tokens, or a smaller --context-parallel-size."
        )
    return layout


def split_in_place(
    adaptor: "Adaptor", scope: Scope, batch: dict[str, Any], documents: Documents | None = None
) -> dict[str, Any]:
    """Replace every sequence of ``batch`` by the part of this rank, and record how the batch was split.

    Args:
        batch: dict of (b, S) tensors, None, and an optional attention_mask (b, 1, S, S), which stays whole, because
            attention selects rows and columns by the layout. Other tensors as long as the sequence are split too, as
            in Megatron, with a notice. Targets that the model would shift are shifted before (targets.py).
        documents: boundaries that the caller knows; None finds them as the settings say.
    """
    sequences = _sequences(batch)
    if not sequences:
        return batch
    record = _record(adaptor, scope, batch, sequences, documents)
    targets = {} if adaptor.settings.moving_targets is None or scope.alone else moved(batch)
    for name, value in (sequences | targets).items():
        batch[name] = _own_memory(record.layout.shard(value, scope.rank, sequence_dim(name, value)).contiguous(), value)
    adaptor.records.remember((batch[name] for name in sequences), record, _telling(batch))
    return batch


def sharded(
    adaptor: "Adaptor", scope: Scope, batch: Batch, documents: Documents | None, sequences: Collection[str]
) -> dict[str, Any]:
    """A new batch of this rank's parts, from whose tensors the model finds the record.

    Raises:
        ValueError: a tensor with an unknown name is as long as the sequence.
    """
    named = named_sequences(batch, sequences)
    record = _record(adaptor, scope, batch, named, documents)
    local = shard_batch(batch, layout=record.layout, cp_rank=scope.rank, sequences=sequences)
    for name, value in named.items():
        local[name] = _own_memory(local[name], value)
    adaptor.records.remember((local[name] for name in named), record, _telling(local))
    return local


def _record(
    adaptor: "Adaptor",
    scope: Scope,
    batch: Batch,
    sequences: Mapping[str, torch.Tensor],
    documents: Documents | None,
) -> MicroBatch:
    """The record of ``batch``, whose ``sequences`` are split."""
    seq_len, num_rows = length_of(sequences), _rows_of(sequences)
    documents, waits = (documents, False) if documents is not None else documents_of_batch(adaptor, batch)
    slices, places = slices_of_batch(batch, documents, num_rows, seq_len, adaptor.settings.image_token_id)
    if slices is not None and adaptor.sizes:
        raise ValueError(
            "a batch with slices (attention_slices, prefix_lengths, image_token_id) is not supported with "
            "--hybrid-context-parallel; leave that out: one row lies on all ranks in balance without it."
        )
    record = MicroBatch(
        layout(adaptor, scope, seq_len, documents, slices),
        documents,
        scope,
        waits_since=adaptor.handed.times if waits else None,
        slices=slices,
        places=places,
    )
    adaptor.sliced |= record.limits_attention if scope.alone else slices is not None
    return record


def _telling(local: Batch) -> list[Any]:
    """The tensors whose copies identify a batch by value; not positions and masks, which many batches share."""
    return [local[name] for name in ("tokens", "input_ids", "labels") if local.get(name) is not None]


def _own_memory(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``part`` with memory of its own, which identifies the record; a copy if it is a view of ``whole``."""
    shares = part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return part.clone() if shares else part


def _sequences(batch: Batch) -> dict[str, torch.Tensor]:
    """The (b, S, ...) tensors of Megatron's own batch: those known by name and, with a notice, others as long."""
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


def _may_be_sequence(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2


def named_sequences(batch: Batch, sequences: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The (b, S, ...) tensors of a framework's batch that have the names of sequences."""
    named = SEQUENCES.union(sequences)
    return {name: value for name, value in batch.items() if name in named and _may_be_sequence(value)}


def length_of(sequences: Mapping[str, torch.Tensor]) -> int:
    """The common length of ``sequences``, name -> tensor; ValueError if they differ or there is none."""
    lengths = {name: value.size(sequence_dim(name, value)) for name, value in sequences.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "the batch holds sequences of different lengths: "
            f"{', '.join(f'{name} {length}' for name, length in lengths.items())}; pad them to one length."
        )
    if not lengths:
        raise ValueError(f"the batch holds no sequence; name one of {', '.join(sorted(SEQUENCES))}.")
    return next(iter(lengths.values()))


def _rows_of(sequences: Mapping[str, torch.Tensor]) -> int:
    """How many rows the batch of these tensors has; name -> tensor."""
    name, value = next(iter(sequences.items()))
    return value.size(sequence_dim(name, value) - 1)


def documents_of_batch(adaptor: "Adaptor", batch: Batch) -> tuple[Documents | None, bool]:
    """Document boundaries of a whole batch, and whether they may still be set until its forward pass.

    They are those set for the batch, else found as the settings say; None if the batch has a mask or slices.
    """
    settings, handed = adaptor.settings, adaptor.handed
    if handed.ends is not None:
        sequences = named_sequences(batch)
        if not handed.waiting or not sequences:
            return None, True
        adaptor.documents_by_hand = handed.of_a_split = True
        return handed.take(_rows_of(sequences), length_of(sequences), divided_by(adaptor)), False
    if batch.get("attention_slices") is not None:
        return None, False
    if batch.get("attention_mask") is not None:
        return None, True
    position_ids, tokens = batch.get("position_ids"), batch.get("tokens", batch.get("input_ids"))
    if settings.documents_from_position_ids and position_ids is not None:
        return documents_of_position_ids(position_ids), True
    if settings.end_of_document is not None and tokens is not None:
        return documents_of_tokens(tokens, settings.end_of_document), True
    return None, True


def divided_by(adaptor: "Adaptor") -> int:
    """The number by which MindSpeed divides the ends that it sets: the ranks of a causal ring."""
    config = adaptor.current.config
    return config.ring_size if config.causal else 1
