"""Split the rows of a shard into slices of equal size, and merge slices of several shards in order of position."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from mindspeed_cp.sequence.runs import Runs, join, length, offsets, split_sizes


class Piece(NamedTuple):
    """Rows start to stop of a shard, which hold consecutive positions from ``position`` on."""

    start: int
    stop: int
    position: int


def slices(rows: Runs, held: Runs, parts: int) -> list[list[Piece]]:
    """Split rows of a shard into ``parts`` slices whose sizes differ by at most one.

    Args:
        rows: ascending and disjoint.
        held: ascending runs of global positions of the whole shard; rows are indices into them.
    """
    sizes = split_sizes(length(rows), parts)
    found: list[list[Piece]] = [[] for _ in sizes]
    number, room = 0, sizes[0]
    for start, stop, position in _pieces(rows, held):
        while start < stop:
            while room == 0:
                number += 1
                room = sizes[number]
            count = min(room, stop - start)
            found[number].append(Piece(start, start + count, position))
            start, position, room = start + count, position + count, room - count
    return found


def _pieces(rows: Runs, held: Runs) -> list[Piece]:
    """The rows, split where their positions are not consecutive."""
    before = offsets(stop - start for start, stop in held)
    pieces = []
    for start, stop in rows:
        run = bisect_right(before, start) - 1
        while start < stop:
            end = min(stop, before[run + 1])
            if start < end:
                pieces.append(Piece(start, end, held[run][0] + start - before[run]))
            start, run = end, run + 1
    return pieces


def in_order(arriving: Sequence[Sequence[Piece]]) -> tuple[Runs, list[Runs]]:
    """Merge the pieces of several shards in the order of their positions.

    Returns:
        (runs of global positions of all pieces; for each shard, the rows of its pieces within them).
    """
    pieces = sorted(
        (piece.position, piece.stop - piece.start, source, index)
        for source, of_source in enumerate(arriving)
        for index, piece in enumerate(of_source)
    )
    places: list[list[tuple[int, int]]] = [[(0, 0)] * len(of_source) for of_source in arriving]
    row = 0
    for _, count, source, index in pieces:
        places[source][index] = row, row + count
        row += count
    runs = join((position, position + count) for position, count, _, _ in pieces)
    return runs, [tuple(of_source) for of_source in places]
