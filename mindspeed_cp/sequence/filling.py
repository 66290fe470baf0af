"""Fill one rank after another with documents, so that few rows of keys have to travel.

For each document of which a rank holds a token, the rank receives the rows before its last token that it does not hold.
So a document that lies whole on one rank costs nothing, and a cut at position p costs p rows: the rank that holds the
tokens after the cut receives those before it. Filling keeps the sum of the cuts small:

* A rank takes the heaviest pieces first (a token's work is its place in its document) and fills up with the lightest
  ones, which leaves it a long stretch of a heavy piece. Whole pieces are preferred.
* A piece that is too long is cut. The rank takes either its two ends, as the zigzag does, or only its end together with
  lighter documents, whichever cut costs less.
* The rest of a cut piece goes back into the pool, as if it were a document of its own.

Areas are Python integers, so that every rank of a job computes the same result on any processor.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from math import inf

Part = tuple[int, int, int]  # document, first token, last + 1: positions within the document

# Tokens of one document that no rank holds yet: (weight, width, document, first token). The weight is twice the mean
# work of a token, so pieces sort by their work. It is a plain tuple because there are many thousands.
Piece = tuple[int, int, int, int]


@dataclass(frozen=True)
class TokenWork:
    """The work of tokens, in (query, key) pairs, and the cost of cutting them off from the tokens before them.

    Args:
        lengths: tokens of each document.
        causal: the query at position p of its document sees p + 1 keys; else every key of the document.
    """

    lengths: Sequence[int]
    causal: bool

    def area(self, document: int, start: int, stop: int) -> int:
        if self.causal:
            return (stop - start) * (start + stop + 1) // 2
        return (stop - start) * self.lengths[document]

    def piece(self, document: int, start: int, stop: int) -> Piece:
        weight = start + stop + 1 if self.causal else 2 * self.lengths[document]
        return weight, stop - start, document, start

    def pieces(self) -> list[Piece]:
        """Every document as one piece, the lightest first."""
        order = sorted((n for n, length in enumerate(self.lengths) if length), key=self.lengths.__getitem__)
        lengths = [self.lengths[document] for document in order]
        weights = [n + 1 for n in lengths] if self.causal else [2 * n for n in lengths]
        return list(zip(weights, lengths, order, repeat(0)))

    def cost(self, document: int, cut: int) -> int:
        """Rows that travel because another rank holds the tokens before ``cut``."""
        return cut if self.causal else self.lengths[document]


def fill_ranks(work: TokenWork, sizes: Sequence[int], goal: int, slack: int) -> tuple[list[list[Part]], int]:
    """Assign all tokens to ranks: (the parts of every rank, the largest area of a rank).

    Args:
        sizes: tokens of every rank; their sum is the documents' total.
        goal: area up to which a rank is filled where the pieces allow.
        slack: by how much a rank may exceed its goal if a whole piece then fits.
    """
    pool = work.pieces()
    ranks = [_Rank(pool, work, size, goal, slack) for size in sizes]
    for rank in ranks[:-1]:
        rank.fill()
    ranks[-1].take_all()
    return [rank.parts for rank in ranks], max(goal - rank.room for rank in ranks)


class _Sums:
    """Cumulative sums over the pieces at one end of a pool, at least as many pieces as ``tokens`` tokens need."""

    def __init__(self, pool: Sequence[Piece], tokens: int, from_heaviest: bool = False) -> None:
        number = 16
        while True:
            pieces = pool[: -number - 1 : -1] if from_heaviest else pool[:number]
            self.tokens = list(accumulate([width for _, width, _, _ in pieces], initial=0))
            if self.tokens[-1] >= tokens or number >= len(pool):
                break
            number *= 4
        self.areas = list(accumulate([width * weight // 2 for weight, width, _, _ in pieces], initial=0))


class _Lightest(_Sums):
    """The lightest pieces of a pool. Pieces that were taken from its heavy end are no longer counted."""

    def __init__(self, pool: list[Piece], work: TokenWork, tokens: int) -> None:
        super().__init__(pool, tokens)
        self._pool, self._work = pool, work

    @property
    def total(self) -> int:
        return self.tokens[min(len(self.tokens) - 1, len(self._pool))]

    def whole(self, tokens: int, without: int = 0) -> int:
        """How many whole pieces the lightest ``tokens`` contain; the heaviest ``without`` pieces do not count."""
        return bisect_right(self.tokens, tokens, 0, min(len(self.tokens), len(self._pool) - without + 1)) - 1

    def area(self, tokens: int, without: int = 0) -> float:
        """Area of the lightest ``tokens``, with only the first tokens of the last piece; inf if the pool has fewer."""
        number = self.whole(tokens, without)
        rest = tokens - self.tokens[number]
        if not rest:
            return self.areas[number]
        if number + 1 >= len(self.tokens) or number >= len(self._pool) - without:
            return inf
        _, _, document, start = self._pool[number]
        return self.areas[number] + self._work.area(document, start, start + rest)

    def cost(self, tokens: int) -> int:
        """Cost of cutting the last piece."""
        number = self.whole(tokens)
        rest = tokens - self.tokens[number]
        if not rest or number >= len(self._pool):
            return 0
        _, _, document, start = self._pool[number]
        return self._work.cost(document, start + rest)


class _Rank:
    """A rank that is filled from the pool of pieces, which ascend in weight.

    ``tokens`` is how many tokens it must still take, ``room`` how much area it may still take.
    """

    def __init__(self, pool: list[Piece], work: TokenWork, tokens: int, goal: int, slack: int) -> None:
        self.pool, self.work = pool, work
        self.size, self.tokens, self.room, self.slack = tokens, tokens, goal, slack
        self.parts: list[Part] = []

    def fill(self) -> None:
        self.lightest = _Lightest(self.pool, self.work, self.tokens)
        self._take_heaviest()
        while self.parts and not self._is_nearly_full() and self._take_one_that_fits():
            pass
        if self.tokens and not (self.parts and self._is_nearly_full()):
            self._cut(self.pool.pop())
        elif self.tokens:
            self._take_lightest()

    def take_all(self) -> None:
        self._take_whole(self.pool)

    def _take(self, document: int, start: int, stop: int) -> None:
        if start < stop:
            self.parts.append((document, start, stop))
            self.tokens -= stop - start
            self.room -= self.work.area(document, start, stop)

    def _take_whole(self, pieces: Sequence[Piece]) -> None:
        self.parts += [(document, start, start + width) for _, width, document, start in pieces]
        self.tokens -= sum([width for _, width, _, _ in pieces])
        self.room -= sum([width * weight // 2 for weight, width, _, _ in pieces])

    def _give_back(self, document: int, start: int, stop: int) -> None:
        if start < stop:
            insort(self.pool, self.work.piece(document, start, stop))

    def _take_heaviest(self) -> None:
        """Take as many of the heaviest pieces as fit whole if the lightest tokens follow them."""
        heaviest = _Sums(self.pool, self.tokens, from_heaviest=True)
        low, high = 0, bisect_right(heaviest.tokens, self.tokens) - 1
        while low < high:
            middle = (low + high + 1) // 2
            light = self.lightest.area(self.tokens - heaviest.tokens[middle], without=middle)
            fits = heaviest.areas[middle] + light <= self.room + self.slack
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            taken = self.pool[: -low - 1 : -1]
            del self.pool[-low:]
            self._take_whole(taken)

    def _fits(self, piece: Piece) -> bool:
        """Whether the rank has room for the whole piece and the lightest tokens after it."""
        weight, width, _, _ = piece
        left = self.room + self.slack - width * weight // 2
        return width <= self.tokens and left >= 0 and self.lightest.area(self.tokens - width) <= left

    def _take_one_that_fits(self) -> bool:
        """Take the heaviest of the other pieces that fits, where it brings the rank nearer to its goal."""
        low, high = 0, len(self.pool)
        while low < high:  # bisection: among uncut documents, the heavier one is also the longer one
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._fits(self.pool[middle]) else (low, middle)
        for number in range(min(low + 2, len(self.pool)) - 1, max(low - 4, 0) - 1, -1):
            piece = self.pool[number]
            if number >= self.lightest.whole(self.tokens) and self._fits(piece):
                if piece[0] * self.tokens < 2 * self.room:
                    return False  # too light: the rank would have all its tokens before it reaches its area
                del self.pool[number]
                self._take_whole((piece,))
                return True
        return False

    def _is_nearly_full(self) -> bool:
        return 20 * self.tokens < self.size or self.room - self.lightest.area(self.tokens) <= 6 * self.slack

    def _cut(self, piece: Piece) -> None:
        """Take the last tokens of the piece, together with its first tokens or with lighter pieces; return the rest."""
        _, width, document, start = piece
        stop, most = start + width, self.room + self.slack
        last, area = self._last_tokens(piece, self._area_of_lightest(piece))
        cost = self.lightest.cost(self.tokens - last)
        if last < width:
            cost += self.work.cost(document, stop - last)
        first = max(0, self.tokens - last - self.lightest.total)
        if width > self.tokens:
            own, own_area = self._last_tokens(piece, lambda tokens: self.work.area(document, start, start + tokens))
            if own_area <= most and (self.work.cost(document, stop - own) <= cost or area > most):
                last, first = own, self.tokens - own
        self._take(document, stop - last, stop)
        self._take(document, start, start + first)
        self._take_lightest()
        self._give_back(document, start + first, stop - last)

    def _area_of_lightest(self, piece: Piece) -> Callable[[int], float]:
        """Area of the lightest tokens, and of the first tokens of ``piece`` where the lightest are too few."""
        _, _, document, start = piece
        total = self.lightest.total

        def area(tokens: int) -> float:
            if tokens <= total:
                return self.lightest.area(tokens)
            return self.lightest.area(total) + self.work.area(document, start, start + tokens - total)

        return area

    def _last_tokens(self, piece: Piece, area_of: Callable[[int], float]) -> tuple[int, float]:
        """(how many last tokens of the piece fill the room, area); ``area_of`` gives the area of the other tokens."""
        _, width, document, start = piece
        stop = start + width

        def area(tokens: int) -> float:
            return self.work.area(document, stop - tokens, stop) + area_of(self.tokens - tokens)

        low, high = 0, min(self.tokens, width)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if area(middle) >= self.room else (middle + 1, high)
        return low, area(low)

    def _take_lightest(self) -> None:
        """Fill up with the lightest pieces; the last one is cut."""
        whole = self.lightest.whole(self.tokens)
        self._take_whole(self.pool[:whole])
        del self.pool[:whole]
        if self.tokens and self.pool:
            _, width, document, start = self.pool.pop(0)
            cut = start + self.tokens
            self._take(document, start, cut)
            self._give_back(document, cut, start + width)
