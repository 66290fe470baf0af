"""The record of a micro-batch: which tokens each rank holds and where documents end; and how it is found again.

Batches overlap: a dataloader splits the next one before this one's forward pass ran, a pipeline keeps several under
way, recomputation comes back to one long after. So a record is never "the batch split last": it is found through the
tensors of its batch (tokens, labels, ...), which travel to the model, or handed over with ``Adaptor.running``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.sequence.layout import SequenceLayout

Documents = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MicroBatch:
    """What every layer must know of a micro-batch.

    Args:
        layout: which tokens of the whole sequence each context-parallel rank holds.
        documents: document boundaries with the leading 0 and the total, one row for all rows of the batch or one row
            for each; None when attention does not stop at documents, or a mask in the batch says where it does.
        scope: over which ranks it was split; None is Megatron's own group.
        waits_for_documents: nobody has said yet where documents end; until its forward pass they may be handed over
            beside the batch (MindSpeed's set_actual_seq_len).
    """

    layout: SequenceLayout
    documents: Documents | None = None
    scope: Scope | None = field(default=None, compare=False)
    waits_for_documents: bool = field(default=False, compare=False)

    @property
    def seq_len(self) -> int:
        """Length of the whole sequence, before it was split."""
        return self.layout.seq_len


def one_row_if_shared(documents: Iterable[Iterable[int]]) -> Documents:
    """Boundaries of every row, as a single row where all rows share them."""
    rows = tuple(tuple(row) for row in documents)
    return rows[:1] if len(set(rows)) == 1 else rows


@dataclass(frozen=True)
class _Part:
    """What is kept of a tensor of a batch: nothing that keeps its memory alive."""

    memory: StorageWeakRef
    tensor: TensorWeakRef | None
    record: MicroBatch


class BatchRecords:
    """Finds the MicroBatch of a tensor; a record lives as long as the memory of a tensor of its batch.

    A tensor leads to the record of its batch by its memory, so that views, views of views and ``detach`` do; what holds
    other memory, such as ``clone`` or ``.to(dtype)`` of tokens, by its values.
    """

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}  # identity of the memory -> the tensor that was remembered there

    def remember(self, tensors: Iterable[Any], record: MicroBatch, telling: Iterable[Any] = ()) -> None:
        """Let every tensor among ``tensors`` lead to ``record``; none of them shares memory with another batch.

        Args:
            telling: those among them of which a copy leads to it too.
        """
        values = {id(tensor) for tensor in telling}
        self._parts = {place: part for place, part in self._parts.items() if not part.memory.expired()}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                memory = tensor.untyped_storage()
                copied = TensorWeakRef(tensor) if id(tensor) in values else None
                self._parts[memory._cdata] = _Part(StorageWeakRef(memory), copied, record)

    def find(self, values: Iterable[Any]) -> MicroBatch | None:
        """The record of the batch to which the tensors among ``values`` belong.

        Raises:
            ValueError: they belong to batches that were split in different ways.
        """
        return _only(self._by_memory(tensor) for tensor in _tensors(values))

    def find_copied(self, values: Iterable[Any]) -> MicroBatch | None:
        """The record of the batch whose tokens or labels have the values of a tensor among ``values``."""
        return _only(self._by_values(tensor) for tensor in _tensors(values))

    def _by_memory(self, tensor: torch.Tensor) -> MicroBatch | None:
        part = self._parts.get(tensor.untyped_storage()._cdata)
        return None if part is None or part.memory.expired() else part.record

    def _by_values(self, tensor: torch.Tensor) -> MicroBatch | None:
        """The record of tensors of whole numbers with the same values; None where batches of equal values differ."""
        if tensor.is_floating_point() or tensor.dim() < 2:
            return None
        alike: list[MicroBatch] = []
        for part in self._parts.values():
            known = None if part.tensor is None else part.tensor()
            if (
                known is not None
                and (known.shape, known.device) == (tensor.shape, tensor.device)
                and not known.is_floating_point()
                and part.record not in alike
                and bool((known == tensor).all())
            ):
                alike.append(part.record)
        return alike[0] if len(alike) == 1 else None

    def clear(self) -> None:
        self._parts.clear()


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor) and value.numel()]


def _only(records: Iterable[MicroBatch | None]) -> MicroBatch | None:
    found: MicroBatch | None = None
    for record in records:
        if record is None or record == found:
            continue
        if found is not None:
            raise ValueError(
                f"the tensors of one forward pass belong to batches of {found.seq_len} and {record.seq_len} tokens "
                f"with layouts {found.layout.kind} and {record.layout.kind} that were split differently; pass the "
                "tensors of one batch, and give an encoder and a decoder of one length."
            )
        found = record
    return found
