"""Rows of a training step, filled with documents by length.

A row over many ranks holds documents of about one length. Then a row of short ones sends nothing, and in a row of long
ones every rank computes about the same, without lighter documents that would have to make up for heavy ones.
"""

from bisect import bisect_right
from collections.abc import Iterable
from operator import index

Rows = tuple[tuple[int, ...], ...]


def pack_documents(lengths: Iterable[int], ranks: int, tokens: int) -> Rows:
    """Share documents out over rows, the longest first, so that each row is filled before the next begins.

    A row lies over ``ranks`` ranks, each of which holds ``tokens`` tokens of it at most; a document may be longer than
    that. The same lengths give the same rows, everywhere.

    Args:
        lengths: tokens of each document.
        ranks: context-parallel ranks of a row; with one row over all ranks, data parallel size x context parallel size.
        tokens: the most that a rank holds, of the whole row.

    Returns:
        For each row, the places of its documents in ``lengths``, ascending. A document of no tokens is in no row; no
        documents make no rows.

    Raises:
        ValueError: a length is no whole number, below 0, or above ranks x tokens; or ranks or tokens are below 1.
    """
    ranks, tokens = _whole("ranks", ranks, 1), _whole("tokens", tokens, 1)
    waiting: list[tuple[int, int]] = []  # (length, less the place), ascending: of equal lengths the first goes first
    for place, length in enumerate(lengths):
        length = _whole(f"lengths[{place}]", length, 0)
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


def _whole(name: str, value: int, least: int) -> int:
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} {value!r} must be a whole number of at least {least}; pass it as an int.")
    return number
