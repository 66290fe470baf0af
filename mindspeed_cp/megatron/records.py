"""The record of a micro-batch: which tokens each rank holds and where documents end; and how it is found again.

Batches overlap: a dataloader splits the next one before this one's forward pass ran, a pipeline keeps several under
way, recomputation comes back to one long after. So a record is never "the batch split last": it is found through the
tensors of its batch (tokens, labels, ...), which travel to the model, or handed over with ``AdaptorState.running``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mindspeed_cp.sequence.layout import SequenceLayout

Documents = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MicroBatch:
    """What every layer must know of a micro-batch.

    Args:
        layout: which tokens of the whole sequence each context-parallel rank holds.
        documents: document boundaries with the leading 0 and the total, one row for all rows of the batch or one row
            for each; None when attention does not stop at documents, or a mask in the batch says where it does.
    """

    layout: SequenceLayout
    documents: Documents | None = None

    @property
    def seq_len(self) -> int:
        """Length of the whole sequence, before it was split."""
        return self.layout.seq_len

    @property
    def shared_documents(self) -> tuple[int, ...] | None:
        """The boundaries that all rows share; None without documents."""
        if self.documents is None or len(self.documents) > 1:
            return None
        return self.documents[0]


def one_row_if_shared(documents: Iterable[Iterable[int]]) -> Documents:
    """Boundaries of every row, as a single row where all rows share them."""
    rows = tuple(tuple(row) for row in documents)
    return rows[:1] if len(set(rows)) == 1 else rows


class BatchRecords:
    """Finds the MicroBatch of a tensor; a record lives as long as a tensor of its batch."""

    def __init__(self) -> None:
        self._by_tensor = WeakIdKeyDictionary()

    def remember(self, tensors: Iterable[Any], record: MicroBatch) -> None:
        """Let every tensor among ``tensors`` lead to ``record``."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._by_tensor[tensor] = record

    def find(self, values: Iterable[Any]) -> MicroBatch | None:
        """The record of the batch to which the tensors among ``values``, or views of its tensors, belong.

        Raises:
            ValueError: they belong to batches that were split in different ways.
        """
        found = None
        for value in values:
            record = self._of(value) if isinstance(value, torch.Tensor) else None
            if record is None or record == found:
                continue
            if found is not None:
                raise ValueError(
                    f"the tensors of one forward pass belong to batches of {found.seq_len} and {record.seq_len} tokens "
                    f"with layouts {found.layout.kind} and {record.layout.kind} that were split differently; pass the "
                    "tensors of one batch."
                )
            found = record
        return found

    def _of(self, tensor):
        record = self._by_tensor.get(tensor)
        if record is None and tensor._base is not None:
            record = self._by_tensor.get(tensor._base)
        return record

    def clear(self) -> None:
        self._by_tensor.clear()
