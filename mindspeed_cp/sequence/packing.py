"""Fill the rows of a training step with documents sorted by length.

A row over many ranks holds documents of similar length. A row of short documents then sends nothing, and in a row of
long ones every rank has about the same work, without lighter documents that would have to make up for heavy ones.
"""

from bisect import bisect_right
from collections.abc import Iterable
from operator import index

Rows = tuple[tuple[int, ...], ...]


def pack_documents(lengths: Iterable[int], ranks: int, tokens: int) -> Rows:
    """Distribute documents over rows, the longest first, so that each row is filled before the next begins.

    A row is spread over ``ranks`` ranks, each of which holds at most ``tokens`` tokens of it; a document may be longer
    than that. The same lengths give the same rows on every rank.

    Args:
        lengths: tokens of each document.
        ranks: context-parallel ranks of a row; with one row over all ranks, data parallel size x context parallel size.
        tokens: the most that a rank holds, of the whole row.

    Returns:
        For each row, the ascending indices of its documents in ``lengths``. Documents without tokens are in no row.

    Raises:
        ValueError: a length is not a whole number from 0 to ranks x tokens, or ranks or tokens is below 1.
    """
    ranks, tokens = whole("ranks", ranks, 1), whole("tokens", tokens, 1)
    waiting: list[tuple[int, int]] = []  # (length, -index), ascending: of equal lengths, the first document goes first
    for place, length in enumerate(lengths):
        length = whole(f"lengths[{place}]", length, 0)
        if length > ranks * tokens:
            raise ValueError(
                f"document {place} has {length} tokens, and a row holds {ranks} ranks x {tokens} tokens = "
                f"{ranks * tokens}; allow {-(-length // ranks)} tokens a rank, use more ranks, or cut the document."
            )
        if length:
            waiting.append((length, -place))
    waiting.sort()
    rows: list[tuple[int, ...]] = []
    while waiting:
        row, room = [], ranks * tokens
        while (number := bisect_right(waiting, (room, 0))) > 0:
            length, place = waiting.pop(number - 1)
            row.append(-place)
            room -= length
        rows.append(tuple(sorted(row)))
    return tuple(rows)


def whole(name: str, value: int, least: int) -> int:
    """``value`` as an int; ValueError if it is not a whole number of at least ``least``."""
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} {value!r} must be a whole number of at least {least}; pass it as an int.")
    return number
