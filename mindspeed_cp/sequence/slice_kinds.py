"""Slices of the masks that are asked for most: prefixes that see each other, and spans inside causal text."""

from collections.abc import Iterable, Sequence

from mindspeed_cp.sequence.runs import Boundaries, Run
from mindspeed_cp.sequence.slice_mask import AttentionSlice, AttentionSlices


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
