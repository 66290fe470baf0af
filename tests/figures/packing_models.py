"""What ``bench packing`` compares with: other ways to share documents out, and the fewest rows that any way sends.

Areas are squares of lengths here, as schedulers count them. Ranks that share a document forward its whole keys, so that
each gets all of it but its own part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from mindspeed_cp.sequence.runs import Runs

LIMIT = 1.05  # of the mean area that a rank may have


@dataclass(frozen=True)
class Count:
    """What a step's documents cost: largest area over the ideal, rows received over tokens, and rows at the least."""

    makespan: float
    rows: float
    least: float = 0.0


def in_order(lengths: Sequence[int], ranks: int, tokens: int) -> list[list[int]]:
    """Rows of documents as they come."""
    rows: list[list[int]] = [[]]
    for length in lengths:
        if sum(rows[-1]) + length > ranks * tokens:
            rows.append([])
        rows[-1].append(length)
    return rows


def static(lengths: Sequence[int], ranks: int, tokens: int, cp_size: int = 4) -> Count | None:
    """Rows of cp_size x tokens in the order of the documents, one for each group of ranks; None: one does not fit."""
    groups = ranks // cp_size
    if max(lengths) > cp_size * tokens:
        return None
    rows = in_order(lengths, cp_size, tokens)
    works = [sum(n * n for n in row) / cp_size for row in rows]
    span = sum(max(works[first : first + groups]) for first in range(0, len(works), groups))
    return Count(span * ranks / sum(n * n for n in lengths), cp_size - 1)


@dataclass
class _Groups:
    """Groups of one size of a micro batch, in the order in which they were made."""

    size: int
    tokens: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)

    def add(self, number: int, length: int) -> None:
        if number == len(self.works):
            self.tokens.append(0.0)
            self.works.append(0.0)
            self.lengths.append([])
        self.tokens[number] += length / self.size
        self.works[number] += length * length / self.size
        self.lengths[number].append(length)

    def best(self, length: int, most: int, top: float) -> tuple[float, int] | None:
        """(largest work after it, number) of the first best group that has room for this document."""
        if not self.works:
            return None
        after = np.maximum(np.array(self.works) + length * length / self.size, top)
        after[np.array(self.tokens) + length / self.size > most] = np.inf
        number = int(after.argmin())
        return (float(after[number]), number) if after[number] < np.inf else None


def dynamic(lengths: Sequence[int], ranks: int, tokens: int) -> Count:
    """Groups of powers of two for every micro batch, as Megatron's dynamic context parallelism forms them.

    Its rules: the longest document comes first, on the fewest ranks that can hold it, and a rank's work is at most 1.05
    of its length x tokens. Every other document, in descending length, goes where the largest work grows least: to a
    group of any size that can hold it and has tokens left, or to a new one of free ranks; else it waits for the next
    micro batch. Ranks that are left without work join the smallest groups, each of which doubles.
    """
    sizes = sorted({1 << power for power in range(ranks.bit_length()) if 1 << power <= ranks} | {ranks})
    left, span, rows = sorted(lengths, reverse=True), 0.0, 0
    while left:
        groups, left = _micro_batch(left, sizes, ranks, tokens)
        span += max(work for each in groups for work in each.works)
        rows += sum((each.size - 1) * sum(held) for each in groups for held in each.lengths)
    return Count(span * ranks / sum(n * n for n in lengths), rows / sum(lengths))


def _micro_batch(left: list[int], sizes: list[int], ranks: int, tokens: int) -> tuple[list[_Groups], list[int]]:
    groups, waiting, top = [_Groups(size) for size in sizes], [], 0.0
    cap, used = left[0] * tokens * 1.05, 0
    for place, length in enumerate(left):
        able = [each for each in groups if each.size * tokens >= length]
        found: tuple[float, _Groups, int] | None = None
        for each in able[:1] if place == 0 else able:
            old = each.best(length, tokens, top)
            new = (max(top, length * length / each.size), len(each.works)) if used + each.size <= ranks else None
            for option in filter(None, (old, new)):
                if option[0] <= cap and (found is None or option[0] < found[0]) or place == 0:
                    found = option[0], each, option[1]
        if found is None:
            waiting.append(length)
            continue
        top, each, number = found
        used += each.size if number == len(each.works) else 0
        each.add(number, length)
    return (groups, waiting) if _spread(groups, ranks - used) else _all_together(left, ranks, tokens)


def _spread(groups: list[_Groups], free: int) -> bool:
    """Double the smallest groups until no rank is free; False where that does not come out."""
    while free:
        place = next(place for place, each in enumerate(groups) if each.works)
        if place + 1 == len(groups) or groups[place + 1].size - groups[place].size > free:
            return False
        free -= groups[place + 1].size - groups[place].size
        larger = groups[place + 1]
        for name in ("tokens", "works", "lengths"):
            value = getattr(groups[place], name).pop(0)
            getattr(larger, name).append(value if name == "lengths" else value * groups[place].size / larger.size)
    return True


def _all_together(left: list[int], ranks: int, tokens: int) -> tuple[list[_Groups], list[int]]:
    group, waiting = _Groups(ranks), []
    for length in left:
        fits = sum(group.tokens) + length / ranks <= tokens
        if fits:
            group.add(0, length)
        else:
            waiting.append(length)
    return [group], waiting


def least_rows(lengths: Sequence[int], ranks: int) -> int:
    """Fewer rows no way can send that gives every rank equal tokens and at most LIMIT of the mean area (causal).

    Two bounds, and the larger one counts. Of a document of L tokens, m ranks hold all tokens from position x on, and
    f = m T - (L - x) others, which are at least as much work as the f lightest tokens of all documents; so x is at
    least where these areas reach m times the limit, and the rows are at least the sum of x over m. And a rank of T
    tokens that receives R rows has an area of at most T R + T (T + 1) / 2.
    """
    tokens, total = sum(lengths) / ranks, sum(n * (n + 1) / 2 for n in lengths)
    limit, light = LIMIT * total / ranks, _Lightest(lengths)
    long = np.array(sorted(n for n in lengths if n > tokens or n * n / 2 > limit), dtype=float)
    rows, count = 0.0, 0
    while len(long) and count < ranks - 1:
        count += 1
        low, high = np.zeros(len(long)), long.copy()
        for _ in range(40):
            x = (low + high) / 2
            others = count * tokens - (long - x)
            can = (others >= 0) & ((long**2 - x**2) / 2 + light.area(others) <= count * limit)
            low, high = np.where(can, low, x), np.where(can, x, high)
        rows += float(low.sum())
        long = long[low >= 1]
    return int(max(rows, ranks * max(0.0, total / ranks / tokens - (tokens + 1) / 2)))


def received_rows(rings: Sequence[Runs], documents: Sequence[int], causal: bool = True) -> np.ndarray:
    """int64 (ring ranks,): how many rows of keys each rank receives if only the rows that it needs travel.

    For each document of which a rank holds a token, it needs the rows up to its last token (full attention: all rows)
    that it does not hold itself.
    """
    ends = np.unique(np.array(documents, dtype=np.int64))
    rows = np.zeros(len(rings), dtype=np.int64)
    for rank, runs in enumerate(rings):
        start, stop = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        first, last = np.searchsorted(ends, start, side="right") - 1, np.searchsorted(ends, stop, side="left") - 1
        read = np.zeros(len(ends), dtype=np.int64)
        # A run contains the end of every document in it except the last, which it holds up to the run's own end.
        np.maximum.at(read, last, (stop if causal else ends[last + 1]) - ends[last])
        whole = np.zeros(len(ends) + 1, dtype=np.int64)
        np.add.at(whole, first, 1)
        np.add.at(whole, last, -1)
        ended = np.flatnonzero(np.cumsum(whole)[:-1] > 0)
        read[ended] = ends[ended + 1] - ends[ended]
        rows[rank] = read.sum() - (stop - start).sum()
    return rows


class _Lightest:
    """Area of the lightest tokens of all documents, whole or not: position p occurs once in each that is longer."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._ends = np.unique([0, *lengths]).astype(float)
        self._longer = len(lengths) - np.searchsorted(np.sort(lengths), self._ends[:-1], side="right")
        widths, squares = np.diff(self._ends), np.diff(self._ends**2) / 2
        self._tokens = np.array([0, *accumulate(self._longer * widths)])
        self._areas = np.array([0, *accumulate(self._longer * squares)])

    def area(self, tokens: np.ndarray) -> np.ndarray:
        place = np.clip(np.searchsorted(self._tokens, tokens, side="right") - 1, 0, len(self._longer) - 1)
        start, longer = self._ends[place], self._longer[place]
        stop = start + np.maximum(tokens - self._tokens[place], 0) / longer
        return self._areas[place] + longer * (stop**2 - start**2) / 2
