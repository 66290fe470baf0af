"""Ranges of positions and the operations on them; all sets of tokens, rows or documents are given in these types.

Run         a half-open range (start, stop) of global positions, or of rows: indices into what a rank holds
Runs        several of them, in the order in which they are held; those of a mask and of a ring rank ascend
Boundaries  where documents end: 0, then ascending ends up to the total (``cu_seqlens`` as ints)
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import index

import torch

Run = tuple[int, int]
Runs = tuple[Run, ...]
Boundaries = tuple[int, ...]


def split_sizes(length: int, parts: int) -> list[int]:
    """Split ``length`` into ``parts`` sizes that differ by at most one; the first parts get the remainder."""
    base, extra = divmod(length, parts)
    return [base + (part < extra) for part in range(parts)]


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where contiguous pieces of these sizes begin, and where the last one ends."""
    return [0, *accumulate(sizes)]


def end_to_end(sizes: Iterable[int]) -> Runs:
    """The ranges of contiguous pieces of these sizes."""
    ends = offsets(sizes)
    return tuple(zip(ends, ends[1:]))


def length(runs: Iterable[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def join(runs: Iterable[Run]) -> Runs:
    """Merge each run with the previous one if it begins where that one ends; drop empty runs, keep the order."""
    joined: list[Run] = []
    for start, stop in runs:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def union(*several: Iterable[Run]) -> Runs:
    """Ascending disjoint runs that cover all given runs, which may overlap."""
    united: list[Run] = []
    for start, stop in sorted(run for runs in several for run in runs):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(stop, united[-1][1]))
        else:
            united.append((start, stop))
    return tuple(united)


def take(runs: Runs, start: int, stop: int) -> Runs:
    """The part of ``runs`` with their tokens start to stop, counted along the runs."""
    taken: list[Run] = []
    seen = 0
    for low, high in runs:
        first, last = max(start - seen, 0), min(stop - seen, high - low)
        if first < last:
            taken.append((low + first, low + last))
        seen += high - low
    return tuple(taken)


def cut(runs: Runs, parts: int) -> list[Runs]:
    """Split the tokens of ``runs`` into ``parts`` consecutive pieces, whose sizes differ by at most one."""
    sizes, found = iter(split_sizes(length(runs), parts)), list[list[Run]]()
    room = 0
    for start, stop in runs:
        while start < stop:
            while room == 0:
                found.append([])
                room = next(sizes)
            end = min(stop, start + room)
            found[-1].append((start, end))
            start, room = end, room - (end - start)
    return [*map(tuple, found), *(() for _ in range(parts - len(found)))]


def rows_of(runs: Runs, held: Runs) -> Runs:
    """Where the positions of ``runs`` lie among the ascending runs ``held``, which contain them, as rows."""
    starts, before = [start for start, _ in held], offsets(stop - start for start, stop in held)

    def rows() -> Iterator[Run]:
        for low, high in runs:
            number = bisect_right(starts, low) - 1
            row = before[number] + low - starts[number]
            yield row, row + high - low

    return join(rows())


def positions(runs: Iterable[Run], device: torch.device | str | None = None) -> torch.Tensor:
    """LongTensor of the positions in ``runs``, in their order."""
    pieces = [torch.arange(start, stop, device=device) for start, stop in runs]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long, device=device)


def boundaries(cu_seqlens: torch.Tensor | Sequence[int], leading_zero: bool = False) -> Boundaries:
    """One row of boundaries as ints, from a tensor of any shape or a list.

    Args:
        leading_zero: prepend a 0 if there is none, as in the ends that MindSpeed passes.

    Raises:
        ValueError: an entry is not a whole number, the entries descend, or the first is not 0.
    """
    given = cu_seqlens.flatten().tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    try:
        numbers = list(map(index, given))
    except TypeError:
        raise ValueError(
            f"cu_seqlens {cu_seqlens} must be one row of whole numbers, the document boundaries from 0 to the total, "
            "or a list of such rows, one for each row of the batch."
        ) from None
    if leading_zero and (not numbers or numbers[0] != 0):
        numbers = [0, *numbers]
    if len(numbers) < 2 or numbers[0] != 0:
        raise ValueError(
            f"cu_seqlens {short(numbers)} must start with 0 and hold at least one document; prepend the leading 0."
        )
    for place, (before, after) in enumerate(zip(numbers, numbers[1:]), start=1):
        if after < before:
            raise ValueError(
                f"cu_seqlens {short(numbers)} must not descend, and entry {place} is {after} after {before}; pass "
                "cumulative document lengths."
            )
    return tuple(numbers)


def short(numbers: Sequence[int]) -> str:
    """The numbers for a message; a long list is abbreviated to its first and last entries."""
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"
