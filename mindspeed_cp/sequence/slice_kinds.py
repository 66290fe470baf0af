"""Slices of the masks that are asked for most: prefixes that see each other, and spans inside causal text."""

from collections.abc import Iterable, Sequence

import numpy as np

from mindspeed_cp.sequence.runs import Boundaries, Run
from mindspeed_cp.sequence.slice_mask import KINDS, AttentionSlice, AttentionSlices, Integers

QUERIES_PER_SLICE = 16  # fewer on average, and a dense mask is as good


def prefix_slices(documents: Boundaries, lengths: Sequence[int]) -> AttentionSlices:
    """Causal attention within documents, whose first tokens see each other (prefix LM).

    Args:
        documents: boundaries with the leading 0 and the total.
        lengths: of the prefix of each document; 0 or 1 is plain causal.

    Raises:
        ValueError: there are not as many lengths as documents, or a prefix is longer than its document.
    """
    if len(lengths) != len(documents) - 1:
        raise ValueError(
            f"prefix lengths {list(lengths)} are {len(lengths)}, and there are {len(documents) - 1} documents; give "
            "one for each document, 0 where it has no prefix."
        )
    spans = []
    for start, stop, length in zip(documents, documents[1:], lengths):
        if not 0 <= length <= stop - start:
            raise ValueError(
                f"a prefix of {length} tokens is longer than its document of {stop - start}, from {start} to {stop}; "
                "give each document the number of its own first tokens."
            )
        spans.append((start, start + length))
    return span_slices(documents, spans)


def span_slices(documents: Boundaries, spans: Iterable[Run]) -> AttentionSlices:
    """Causal attention within documents, in which the tokens of each span see each other as well (images in text).

    Args:
        documents: boundaries with the leading 0 and the total.
        spans: (first token, last + 1), ascending and disjoint; one that crosses a boundary is cut there.
    """
    left, found = list(reversed([*spans])), list[AttentionSlice]()
    for first, end in zip(documents, documents[1:]):
        start = first
        while start < end:
            while left and left[-1][1] <= start:
                left.pop()
            low, high = left[-1] if left and left[-1][0] < end else (end, end)
            low, high = max(low, start), min(high, end)
            if start < low:
                found.append(((start, low), (first, low), "causal"))
            if low < high:
                found.append(((low, high), (first, high), "full"))
            start = high
    return tuple(found)


def slices_of_ranges(first: Integers, last: Integers) -> AttentionSlices | None:
    """The slices of queries that see one range of keys each; None where it takes more than a sixteenth of the queries.

    Args:
        first, last: int64 (seq,), the first key of each query, and the last + 1; no key where they are equal.
    """
    steps, seen = (np.diff(first), np.diff(last)), last > first
    straight = (((steps[0] | steps[1]) & ~1) == 0) & seen[1:] & seen[:-1]
    kinds = np.where(straight, 2 * steps[0] + steps[1], -1)  # of the step to the next query, as KINDS counts
    ends = np.flatnonzero(np.append(kinds[1:] != kinds[:-1], True)) + 1 if len(kinds) else kinds
    if len(ends) > max(len(first) // (QUERIES_PER_SLICE // 2), 1):
        return None
    found, query = list[tuple[int, int, int]](), 0  # (first query, last + 1, kind)
    for start, stop in zip([0, *ends.tolist()], ends.tolist()):
        kind = int(kinds[start])
        if kind < 0:
            found += [(each, each + 1, 0) for each in range(query, stop)]
            query = max(query, stop)
        elif query < stop:  # the step into these queries belongs to no slice
            found.append((max(query, start), stop + 1, kind))
            query = stop + 1
    found += [(each, each + 1, 0) for each in range(query, len(first))]
    found = [part for part in found if seen[part[0]]]
    if len(found) > max(len(first) // QUERIES_PER_SLICE, 1):
        return None
    names = list(KINDS)
    return tuple(((start, stop), (int(first[start]), int(last[stop - 1])), names[kind]) for start, stop, kind in found)
