"""The record of a micro-batch (which tokens each rank holds, and where documents end), and how it is found.

Batches overlap: a dataloader splits the next one before the forward pass of this one, a pipeline has several in flight,
recomputation uses one much later. So a record is never that of "the batch split last": it is found through the tensors
of its batch (tokens, labels, ...), which are passed to the model, or set with ``Adaptor.running``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from mindspeed_cp.megatron.scopes import Scope, collective_device
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import Runs
from mindspeed_cp.sequence.slice_mask import AttentionSlices

Documents = tuple[tuple[int, ...], ...]
Slices = tuple[AttentionSlices, ...]
Places = tuple[Runs, ...]
Entry = TypeVar("Entry")
COMPARED = 32  # number of batches with equal values that ranks compare


@dataclass(frozen=True)
class MicroBatch:
    """What every layer must know about a micro-batch.

    Args:
        layout: which tokens of the whole sequence each context-parallel rank holds.
        documents: document boundaries with the leading 0 and the total, for all rows of the batch or per row; None if
            attention is not limited to documents, or a mask in the batch contains them.
        scope: the ranks over which it was split; None means Megatron's own group.
        waits_since: how often document ends had been set (MindSpeed's set_actual_seq_len) before it was split, if they
            may still be set until its forward pass; else None.
        slices: what tokens see, for all rows of the batch or per row; None if mask type and documents determine it.
        places: the rotary position ids of a batch with slices, without repeated rows; None if they count from 0 to the
            end.
        moved_from: the batch's own layout while layers with another layout run, else None.
    """

    layout: SequenceLayout
    documents: Documents | None = None
    scope: Scope | None = field(default=None, compare=False)
    waits_since: int | None = field(default=None, compare=False)
    slices: Slices | None = None
    places: Places | None = None
    moved_from: SequenceLayout | None = field(default=None, compare=False)

    @property
    def seq_len(self) -> int:
        """Length of the whole sequence, before it was split."""
        return self.layout.seq_len

    @property
    def limits_attention(self) -> bool:
        """Whether slices, or several documents of a row, say what its tokens see."""
        return self.slices is not None or any(len(row) > 2 for row in self.documents or ())


def one_row_if_shared(rows: Iterable[tuple[Entry, ...]]) -> tuple[tuple[Entry, ...], ...]:
    """Boundaries, or slices, of every row, as a single row if all rows are equal."""
    known = tuple(rows)
    return known[:1] if len(set(known)) == 1 else known


@dataclass(frozen=True)
class _Part:
    """Data about a tensor of a batch, without a reference that keeps its memory alive.

    Args:
        number: the batch's number among those split over its scope, the same on all ranks of the scope.
    """

    memory: StorageWeakRef
    tensor: TensorWeakRef | None
    record: MicroBatch
    number: int


class BatchRecords:
    """Finds the MicroBatch of a tensor; a record lives as long as the memory of a tensor of its batch.

    A tensor is identified by its memory, so that views, views of views and ``detach`` work. Copies, such as ``clone``
    or ``.to(dtype)`` of tokens, are identified by their values, on which all ranks must agree: on a single rank the
    parts of several batches may be equal, for example common prefixes or padding.
    """

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}  # identity of the memory -> data about its tensor
        self._counts: WeakKeyDictionary[Scope, int] = WeakKeyDictionary()  # number of batches split over a scope

    def remember(self, tensors: Iterable[Any], record: MicroBatch, telling: Iterable[Any] = ()) -> None:
        """Associate every tensor in ``tensors`` with ``record``; none may share memory with another batch.

        Args:
            telling: those among them whose copies are identified by value.
        """
        values = {id(tensor) for tensor in telling}
        number = 0
        if values and record.scope is not None:
            number = self._counts[record.scope] = self._counts.get(record.scope, 0) + 1
        self._parts = {place: part for place, part in self._parts.items() if not part.memory.expired()}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                memory = tensor.untyped_storage()
                copied = TensorWeakRef(tensor) if id(tensor) in values else None
                self._parts[memory._cdata] = _Part(StorageWeakRef(memory), copied, record, number)

    def find(self, values: Iterable[Any]) -> MicroBatch | None:
        """The record of the batch to which the tensors among ``values`` belong.

        Raises:
            ValueError: they belong to batches that were split in different ways.
        """
        return _only(self._by_memory(tensor) for tensor in _tensors(values))

    def find_copied(self, values: Iterable[Any], scope: Scope) -> MicroBatch | None:
        """The record of the batch over ``scope`` that all ranks identify by values; collective over its ranks.

        Raises:
            ValueError: the values match several batches that were split in different ways.
        """
        tensors = _tensors(values)
        if not tensors or not self._counts.get(scope):
            return None
        by_tensor = [found for tensor in tensors if (found := self._by_values(tensor, scope))]
        alike = {part.number: part.record for found in by_tensor for part in found}
        mine = set(alike).intersection(*({part.number for part in found} for found in by_tensor)) or set(alike)
        return _only(alike[number] for number in _on_all_ranks(mine, scope))

    def copied_from(self, tokens: torch.Tensor | None) -> MicroBatch | None:
        """The record of a batch of which ``tokens`` are a copy, over any scope; only if they are not all equal.

        Raises:
            ValueError: they match several batches with different records.
        """
        if tokens is None:
            return None
        alike = self._by_values(tokens, None)
        return _only(part.record for part in alike) if bool(tokens.ne(tokens.flatten()[:1]).any()) else None

    def _by_memory(self, tensor: torch.Tensor) -> MicroBatch | None:
        part = self._parts.get(tensor.untyped_storage()._cdata)
        return None if part is None or part.memory.expired() else part.record

    def _by_values(self, tensor: torch.Tensor, scope: Scope | None) -> list[_Part]:
        """Parts of batches over ``scope`` (None for any) that have the values of an integer tensor."""
        if tensor.is_floating_point() or tensor.dim() < 2:
            return []
        alike = []
        for part in self._parts.values():
            elsewhere = scope is not None and part.record.scope is not scope
            known = None if part.tensor is None or elsewhere else part.tensor()
            if (
                known is not None
                and (known.shape, known.device) == (tensor.shape, tensor.device)
                and not known.is_floating_point()
                and bool((known == tensor).all())
            ):
                alike.append(part)
        return alike

    def clear(self) -> None:
        self._parts.clear()
        self._counts.clear()


def _on_all_ranks(numbers: Iterable[int], scope: Scope) -> list[int]:
    """The numbers that every rank of ``scope`` passes, among its newest ``COMPARED``; collective over its ranks."""
    newest = sorted(numbers, reverse=True)[:COMPARED]
    mine = torch.tensor(newest + [0] * (COMPARED - len(newest)), device=collective_device(scope.group))
    everyone = [torch.empty_like(mine) for _ in range(scope.size)]
    dist.all_gather(everyone, mine, group=scope.group)
    shared = set.intersection(*map(set, torch.stack(everyone).tolist()))
    return sorted(shared - {0})


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
