"""Masks as sets of slices: causal, full, packed, windowed and sliced masks all have this form.

A slice is the set of pairs from a range of queries and a range of keys whose distance key - query is within limits::

    query q0 <= p < q1      key k0 <= k < k1      lower <= k - p <= upper

Plain causal attention is one slice with upper = 0; a packed row has one slice per document; a sliding window sets the
limits of each. No two slices of a mask share a pair. Memory is proportional to the number of slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.runs import Boundaries, Run

Integers = npt.NDArray[np.int64]
SliceKind = Literal["full", "causal", "inverse", "band"]
AttentionSlice = tuple[Run, Run, SliceKind]  # queries, keys, kind
AttentionSlices = tuple[AttentionSlice, ...]

FAR = 1 << 60  # beyond every position: no limit
PAIRS_AT_ONCE = 1 << 20  # how many pairs of slices are checked for overlap at once
# kind -> (limited below by the diagonal of first query and first key, limited above by that of last query and last key)
KINDS: dict[SliceKind, tuple[bool, bool]] = {
    "full": (False, False),
    "causal": (False, True),
    "inverse": (True, False),
    "band": (True, True),
}


class SliceTable(NamedTuple):
    """Slices as arrays of equal length; -FAR and FAR mean no limit."""

    q_start: Integers
    q_stop: Integers
    k_start: Integers
    k_stop: Integers
    lower: Integers
    upper: Integers

    def chosen(self, which: npt.NDArray[np.bool_] | Integers) -> "SliceTable":
        return SliceTable(*(column[which] for column in self))


@dataclass(frozen=True, eq=False)
class SliceMask:
    """A set of slices; hashable, and equal if the slices are equal, so that plans can be cached. Made by ``of``.

    Args:
        slices: sorted by first query, then first key. Each query of a slice sees a key in it, and each key is seen.
    """

    slices: SliceTable

    @classmethod
    def of(cls, slices: SliceTable) -> "SliceMask":
        """The mask of these disjoint slices, trimmed of queries that see no key and of keys that no query sees."""
        slices = slices.chosen(_show_something(slices))
        q_start, q_stop, k_start, k_stop, lower, upper = slices
        q_start, q_stop = np.maximum(q_start, k_start - upper), np.minimum(q_stop, k_stop - lower)
        k_start, k_stop = np.maximum(k_start, q_start + lower), np.minimum(k_stop, q_stop + upper)
        # Drop limits that hide nothing, so that equal masks have equal slices and a slice of one query is a rectangle.
        lower = np.where(lower <= k_start - q_stop + 1, -FAR, lower)
        upper = np.where(upper >= k_stop - 1 - q_start, FAR, upper)
        table = SliceTable(q_start, q_stop, k_start, k_stop, lower, upper)
        return cls(table if (np.diff(q_start) > 0).all() else table.chosen(np.lexsort((k_start, q_start))))

    def __len__(self) -> int:
        return len(self.slices.q_start)

    def __repr__(self) -> str:
        return f"SliceMask({len(self)} slices, {hash(self) & 0xFFFFFFFF:08x})"

    @property
    def num_bytes(self) -> int:
        return len(self.slices) * self.slices.q_start.nbytes

    @cached_property
    def _hash(self) -> int:
        # Thousands of slices are hashed once, not at every lookup.
        return hash(tuple(column.tobytes() for column in self.slices))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, SliceMask)
            and self._hash == other._hash
            and all(map(np.array_equal, self.slices, other.slices))
        )

    def within(self, cu_seqlens: Boundaries) -> "SliceMask":
        """The part of the mask whose query and key belong to the same document."""
        ends, slices = np.unique(np.array(cu_seqlens, dtype=np.int64)), self.slices
        first = np.searchsorted(ends, slices.q_start, side="right") - 1
        owner, number = spread(np.searchsorted(ends, slices.q_stop, side="left") - first)
        low, high = ends[first[owner] + number], ends[first[owner] + number + 1]
        return SliceMask.of(_shared(slices.chosen(owner), SliceTable(low, high, low, high, *_unlimited(len(low)))))

    def in_window(self, left: int | None, right: int | None) -> "SliceMask":
        """The part of the mask in which the query at p sees keys p - left to p + right; None is unlimited."""
        if left is None and right is None:
            return self
        far = np.array(FAR)
        limits = np.array(-FAR if left is None else -left), np.array(FAR if right is None else right)
        return SliceMask.of(_shared(self.slices, SliceTable(-far, far, -far, far, *limits)))


def _unlimited(count: int) -> tuple[Integers, Integers]:
    far = np.full(count, FAR)
    return -far, far


def _shared(one: SliceTable, other: SliceTable) -> SliceTable:
    """The intersections of corresponding slices, which are slices again and may be empty."""
    return SliceTable(
        np.maximum(one.q_start, other.q_start),
        np.minimum(one.q_stop, other.q_stop),
        np.maximum(one.k_start, other.k_start),
        np.minimum(one.k_stop, other.k_stop),
        np.maximum(one.lower, other.lower),
        np.minimum(one.upper, other.upper),
    )


def _show_something(slices: SliceTable) -> npt.NDArray[np.bool_]:
    """Whether each slice contains a pair."""
    q_start, q_stop, k_start, k_stop, lower, upper = slices
    some_query = np.maximum(q_start, k_start - upper) < np.minimum(q_stop, k_stop - lower)
    some: npt.NDArray[np.bool_] = some_query & (k_start < k_stop) & (lower <= upper)
    return some


def frozen(value: Any) -> Any:
    """``value`` with lists as tuples and numpy integers as ints, so that it is hashable and can be written as JSON."""
    if isinstance(value, (tuple, list)):
        return tuple([part if type(part) in (int, str) else frozen(part) for part in value])
    if isinstance(value, np.integer):
        return int(value)
    return value


def spread(counts: Integers) -> tuple[Integers, Integers]:
    """For counts (2, 0, 3): each member's owner (0, 0, 2, 2, 2), and its number there (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def document_mask(left: int | None = None, right: int | None = None, cu_seqlens: Boundaries | None = None) -> SliceMask:
    """Every query sees the keys of its document, one slice each, at most ``left`` before and ``right`` after it.

    Args:
        left, right: None is unlimited; causal is right = 0.
        cu_seqlens: document boundaries with the leading 0 and the total, or None for one document of any length.
    """
    ends = np.array([-FAR, FAR]) if cu_seqlens is None else np.unique(np.array(cu_seqlens, dtype=np.int64))
    start, stop = ends[:-1], ends[1:]
    return SliceMask.of(SliceTable(start, stop, start, stop, *_unlimited(len(start)))).in_window(left, right)


def slices_mask(slices: Sequence[AttentionSlice], seq_len: int) -> SliceMask:
    """The mask of slices in the form that ``context_parallel_attention`` takes.

    Raises:
        ValueError: a slice is malformed or exceeds the sequence, or two slices share a pair.
    """
    rows = [_numbers(number, given, seq_len) for number, given in enumerate(slices)]
    table = SliceTable(*np.array(rows, dtype=np.int64).reshape(-1, 6).T)
    _refuse_overlaps(table, slices)
    return SliceMask.of(table)


def _numbers(number: int, given: AttentionSlice, seq_len: int) -> tuple[int, int, int, int, int, int]:
    """A slice as a row of a SliceTable."""
    try:
        (q_start, q_stop), (k_start, k_stop), kind = given
    except (TypeError, ValueError):
        raise ValueError(
            f"attention_slices {number} is {given!r} and must be ((first query, last + 1), (first key, last + 1), "
            f"kind), kind one of {', '.join(KINDS)}."
        ) from None
    ends = (q_start, q_stop, k_start, k_stop)
    if any(isinstance(end, bool) or not isinstance(end, (int, np.integer)) for end in ends):
        raise ValueError(f"attention_slices {number} is {given!r}, and its ranges must be whole numbers, not tensors.")
    if not (0 <= q_start <= q_stop <= seq_len and 0 <= k_start <= k_stop <= seq_len):
        raise ValueError(
            f"attention_slices {number} is {given!r}, and its ranges must ascend and lie in the sequence of {seq_len} "
            "tokens; ranges are half open and count global positions."
        )
    if kind not in KINDS:
        raise ValueError(f"attention_slices {number} is {given!r}, and its kind must be one of {', '.join(KINDS)}.")
    below, above = KINDS[kind]
    return q_start, q_stop, k_start, k_stop, k_start - q_start if below else -FAR, k_stop - q_stop if above else FAR


def _refuse_overlaps(table: SliceTable, slices: Sequence[AttentionSlice]) -> None:
    """Raise ValueError if two slices share a pair, which the softmax would count twice."""
    by_query, by_key = (_meeting(*ends) for ends in (table[:2], table[2:4]))
    order, counts = min(by_query, by_key, key=lambda found: int(found[1].sum()))
    ends = np.searchsorted(np.cumsum(counts), np.arange(0, counts.sum(), PAIRS_AT_ONCE), side="left")
    for start, stop in zip(ends, [*ends[1:], len(counts)]):
        owner, number = spread(counts[start:stop])
        one, other = order[start + owner], order[start + owner + number + 1]
        shared = _show_something(_shared(table.chosen(one), table.chosen(other)))
        if shared.any():
            place = int(np.argmax(shared))
            first, second = sorted((int(one[place]), int(other[place])))
            raise ValueError(
                f"attention_slices {first} {slices[first]} and {second} {slices[second]} overlap, and a query would "
                "count a key twice; let every (query, key) be in one slice at most: shorten one of the ranges, or cut "
                "a slice in two around the other."
            )


def _meeting(start: Integers, stop: Integers) -> tuple[Integers, Integers]:
    """(order of the ranges by start, for each range how many later ones begin before it ends)."""
    order = np.lexsort((stop, start))
    ahead = np.searchsorted(start[order], stop[order], side="left") - np.arange(len(order)) - 1
    return order, np.maximum(ahead, 0)
