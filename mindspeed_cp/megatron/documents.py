"""Document boundaries from tokens, position ids, PackedSeqParams, a dense mask, or ends that were set separately."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mindspeed_cp.megatron.records import Documents, Slices, one_row_if_shared
from mindspeed_cp.sequence.slice_kinds import slices_of_ranges

ROWS_AT_ONCE = 1024  # rows of a dense mask that are examined at once, to need little extra memory


def documents_of_tokens(tokens: torch.Tensor, end_of_document: int | Callable[[], int]) -> Documents:
    """Boundaries after every end-of-document token, as in Megatron's own masks.

    Args:
        tokens: (batch, seq), the whole sequence.
        end_of_document: the token, or a function that returns it.
    """
    end = end_of_document() if callable(end_of_document) else end_of_document
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == end
    return _documents_from(starts)


def documents_of_position_ids(position_ids: torch.Tensor) -> Documents:
    """Boundaries where position ids restart at 0.

    Args:
        position_ids: (batch, seq), the whole sequence; or (3, batch, seq), of which all three begin again.
    """
    starts = position_ids == 0
    return _documents_from(starts.all(0) if starts.dim() == 3 else starts)


def _documents_from(starts: torch.Tensor) -> Documents:
    """Boundaries of every row; ``starts`` is bool (batch, seq), True on the first token of a document."""
    seq_len, rows = starts.size(1), [[0] for _ in range(starts.size(0))]
    for row, position in starts[:, 1:].nonzero().tolist():
        rows[row].append(position + 1)
    return one_row_if_shared((*row, seq_len) for row in rows)


def places_in_documents(positions: torch.Tensor, boundaries: Sequence[int]) -> torch.Tensor:
    """Distance of each global position from its document's start; tokens after the last document count on from it."""
    starts = torch.tensor(sorted(set(boundaries[:-1])), device=positions.device)
    return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]


def documents_of_rows(cu_seqlens: Any) -> Documents:
    """Boundaries as a caller passes them, a tensor or ints, for all rows or per row."""
    rows = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else [*cu_seqlens]
    if all(isinstance(row, int) for row in rows):
        rows = [rows]
    return one_row_if_shared(tuple(row.tolist() if isinstance(row, torch.Tensor) else row) for row in rows)


class BoundaryCache:
    """Reads boundaries from the device once per tensor, since every layer and RoPE need the same ones."""

    def __init__(self) -> None:
        self._read = WeakIdKeyDictionary()

    def boundaries(self, cu_seqlens: torch.Tensor) -> tuple[int, ...]:
        """``cu_seqlens`` as ints; (n,) or (1, n)."""
        version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
        known = self._read.get(cu_seqlens)
        if known is None or known[0] != version:
            self._read[cu_seqlens] = known = (version, tuple(cu_seqlens.flatten().tolist()))
        boundaries: tuple[int, ...] = known[1]
        return boundaries

    def padded(self, params: Any) -> tuple[int, ...]:
        """Boundaries of PackedSeqParams in which each document includes its padding."""
        padded = params.cu_seqlens_q_padded
        return self.boundaries(params.cu_seqlens_q if padded is None else padded)

    def documents(self, params: Any, seq_len: int | None = None) -> tuple[int, ...]:
        """Boundaries of PackedSeqParams in which padding is a separate document.

        With padded boundaries the tokens of a document are followed by its padding, which becomes a separate document,
        so that no token sees it. The same holds for tokens after the last document.

        Args:
            params: PackedSeqParams in thd.
            seq_len: tokens in the whole packed sequence, None for the last boundary.
        """
        true, padded, ends = self.boundaries(params.cu_seqlens_q), self.padded(params), [0]
        for index in range(len(true) - 1):
            end = padded[index] + true[index + 1] - true[index]
            ends += [end, padded[index + 1]] if end < padded[index + 1] else [end]
        if seq_len is not None and ends[-1] < seq_len:
            ends.append(seq_len)
        return tuple(ends)


@dataclass
class Handed:
    """Document ends that were set last, separately from the batch (MindSpeed's ``set_actual_seq_len``).

    MindSpeed keeps them until others are set, and its attention reads them when it runs. So they apply to the next
    batch that is split, and to every later forward pass whose own batch contains no documents.

    Args:
        ends: document ends over the concatenated rows of a micro-batch, with or without a leading 0.
        waiting: whether no batch has used them yet.
        times: how often they were set.
        of_a_split: whether a batch used them when it was split.
        position_ids: stored for the getter, not used here.
    """

    ends: torch.Tensor | Sequence[int] | None = None
    waiting: bool = False
    times: int = 0
    of_a_split: bool = False
    position_ids: Any = None

    def set_ends(self, ends: torch.Tensor | Sequence[int] | None) -> None:
        self.ends, self.waiting, self.of_a_split = ends, ends is not None, False
        self.times += 1

    def take(self, rows: int, seq_len: int, divided_by: int = 1) -> Documents | None:
        """Boundaries of every row of a batch (one row if all rows have the same), or None.

        Args:
            rows, seq_len: those of the whole batch.
            divided_by: the ring size, by which MindSpeed divides ends in its causal ring; the last end shows whether it
                did.

        Raises:
            ValueError: the ends do not ascend, or the last one is not the end of the batch.
        """
        if self.ends is None:
            return None
        self.waiting = False
        given = self.ends.flatten().tolist() if isinstance(self.ends, torch.Tensor) else list(self.ends)
        ends, total = [int(end) for end in given if end], rows * seq_len
        if ends and divided_by > 1 and ends[-1] * divided_by == total:
            ends = [end * divided_by for end in ends]
        last = ends[-1] if ends else None
        if last is None or last > total or ends[0] < 0 or ends != sorted(ends) or (divided_by > 1 and last != total):
            divided = f", or all divided by {divided_by}" if divided_by > 1 else ""
            raise ValueError(
                f"set_actual_seq_len got ends up to {last or 'nothing'}, and the batch has {rows} rows of {seq_len} "
                f"tokens; give ascending ends over all its rows, the last one {total}{divided}."
            )
        starts = [row * seq_len for row in range(rows)]
        return one_row_if_shared(
            (0, *(end - start for end in ends if start < end < start + seq_len), seq_len) for start in starts
        )


@dataclass(frozen=True)
class MaskFacts:
    """A simpler description of a dense mask.

    Args:
        documents: boundaries, if the mask is causal attention within these documents (one document if plain causal);
            else None.
        slices: equivalent slices, if each query sees one range of keys and few slices suffice; else None.
    """

    documents: Documents | None
    slices: Slices | None = None

    @property
    def is_causal(self) -> bool:
        return self.documents is not None and all(len(row) == 2 for row in self.documents)


def examine_mask(mask: torch.Tensor) -> MaskFacts:
    """Recognise causal attention (plain or within documents) and slices in a dense mask.

    Args:
        mask: bool (batch, 1, seq, seq), True = masked out.
    """
    seq = mask.shape[-1]
    columns = torch.arange(seq, device=mask.device)
    ranges = []
    for start in range(0, seq, ROWS_AT_ONCE):
        visible = mask[:, 0, start : start + ROWS_AT_ONCE].logical_not()
        first = visible.to(torch.uint8).argmax(-1)
        last = first + visible.sum(-1)
        expected = (columns >= first.unsqueeze(-1)) & (columns < last.unsqueeze(-1))
        if not torch.equal(visible, expected):
            return MaskFacts(None)
        ranges.append(torch.stack([first, last]))
    first, last = torch.cat(ranges, dim=2)
    starts_here = first == columns
    goes_on = starts_here[:, 1:] | (first[:, 1:] == first[:, :-1])
    if bool((last == columns + 1).all() and goes_on.all()):
        return MaskFacts(_documents_from(starts_here))
    rows = [slices_of_ranges(*row) for row in torch.stack([first, last], 1).cpu().numpy()]
    found = [row for row in rows if row is not None]
    return MaskFacts(None, one_row_if_shared(found) if len(found) == len(rows) else None)


class MaskCache:
    """Caches MaskFacts of the masks of the running forward pass, without keeping masks alive.

    A model's layers share one mask, and recomputation passes an alias of it. When a mask is freed its entry is removed,
    because its memory may be reused. Memory may also be overwritten without a new version (in inference mode, through
    .data or numpy), so that entries are valid only within one pass.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, Any] = {}  # memory of the mask -> (weak reference to its owner, facts)

    def facts(self, mask: torch.Tensor, as_bool: Callable[[], torch.Tensor], forward_pass: int | None) -> MaskFacts:
        """The MaskFacts of ``mask``.

        Args:
            as_bool: () -> the same mask as bool (batch, 1, seq, seq).
            forward_pass: number of the running pass; None outside of one, where nothing is cached.
        """
        if forward_pass is None:
            return examine_mask(as_bool())
        version = 0 if mask.is_inference() else mask._version  # inference tensors have no version
        key = (mask.data_ptr(), tuple(mask.shape), mask.stride(), mask.dtype, version, forward_pass)
        self._entries = {known: entry for known, entry in self._entries.items() if entry[0]() is not None}
        if key not in self._entries:
            self._entries[key] = (weakref.ref(mask), examine_mask(as_bool()))
        facts: MaskFacts = self._entries[key][1]
        return facts

    def clear(self) -> None:
        self._entries.clear()
