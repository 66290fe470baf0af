"""Slices of the most common masks: bidirectional prefixes, and bidirectional spans inside causal text."""

from collections.abc import Iterable, Sequence

import numpy as np

from mindspeed_cp.sequence.runs import Boundaries, Run
from mindspeed_cp.sequence.slice_mask import KINDS, AttentionSlice, AttentionSlices, Integers

QUERIES_PER_SLICE = 16  # with fewer queries per slice on average, a dense mask is as good


def prefix_slices(documents: Boundaries, lengths: Sequence[int]) -> AttentionSlices:
    """Causal attention within documents, where the tokens of a prefix also see each other (prefix LM).

    Args:
        documents: boundaries with the leading 0 and the total.
        lengths: prefix length of each document; 0 or 1 is plain causal.

    Raises:
        ValueError: the numbers of lengths and documents differ, or a prefix is longer than its document.
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
                f"a prefix of {length} tokens is negative or longer than its document of {stop - start}, from {start} "
                f"to {stop}; give each document the number of its own first tokens."
            )
        spans.append((start, start + length))
    return span_slices(documents, spans)


def span_slices(documents: Boundaries, spans: Iterable[Run]) -> AttentionSlices:
    """Causal attention within documents, where the tokens of a span also see each other (images in text).

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
    """The slices of a mask in which each query sees one range of keys; None if these are more than 1 per 16 queries.

    Args:
        first, last: int64 (seq,), first key and last + 1 of each query; equal if the query sees no key.
    """
    steps, seen = (np.diff(first), np.diff(last)), last > first
    straight = (((steps[0] | steps[1]) & ~1) == 0) & seen[1:] & seen[:-1]
    kinds = np.where(straight, 2 * steps[0] + steps[1], -1)  # of the step to the next query, as an index into KINDS
    ends = np.flatnonzero(np.append(kinds[1:] != kinds[:-1], True)) + 1 if len(kinds) else kinds
    if len(ends) > max(len(first) // (QUERIES_PER_SLICE // 2), 1):
        return None
    found, query = list[tuple[int, int, int]](), 0  # (first query, last + 1, kind)
    for start, stop in zip([0, *ends.tolist()], ends.tolist()):
        kind = int(kinds[start])
        if kind < 0:
            found += [(each, each + 1, 0) for each in range(query, stop)]
            query = max(query, stop)
        elif query < stop:  # at least two queries of these steps are in no slice yet
            found.append((max(query, start), stop + 1, kind))
            query = stop + 1
    found += [(each, each + 1, 0) for each in range(query, len(first))]
    found = [part for part in found if seen[part[0]]]
    if len(found) > max(len(first) // QUERIES_PER_SLICE, 1):
        return None
    names = list(KINDS)
    return tuple(((start, stop), (int(first[start]), int(last[stop - 1])), names[kind]) for start, stop, kind in found)
