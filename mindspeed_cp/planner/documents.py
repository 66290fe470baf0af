"""Packed documents for the planner: lengths from a dataset or a distribution, and rows that are filled with them."""

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mindspeed_cp.planner.indexed_dataset import read_index
from mindspeed_cp.sequence.packing import pack_documents
from mindspeed_cp.sequence.runs import offsets

Boundaries = tuple[int, ...]
BATCHES = 15  # number of batches to draw; the planner uses the one with the median attention area

# name -> function that draws a length from the distribution's two parameters
DISTRIBUTIONS: dict[str, Callable[[random.Random, float, float], float]] = {
    "uniform": lambda draw, low, high: draw.uniform(low, high),
    "lognormal": lambda draw, mu, sigma: draw.lognormvariate(mu, sigma),
    "pareto": lambda draw, scale, alpha: scale * draw.paretovariate(alpha),
}
USAGE = "give the .idx of a Megatron dataset, or uniform:64,512, lognormal:6.5,1.3 or pareto:100,0.9"


def boundaries(
    source: str, seq_length: int, rows: int = 1, by_length: bool = False
) -> Boundaries | tuple[Boundaries, ...]:
    """Return cu_seqlens of a typical micro batch, per row if it has several. Documents come in random order and
    the last one is cut, as in Megatron's GPT datasets.

    Args:
        source: a path that ends in .idx, or NAME:FIRST,SECOND for a distribution.
        by_length: fill rows with whole documents of similar length, like ``pack_documents``; the rest of the row is one
            more document.

    Raises:
        ValueError: the file is empty or not a dataset index, or the distribution is not known.
    """
    draw = random.Random(0)
    if source.endswith(".idx"):
        lengths = read_lengths(source)

        def next_length() -> int:
            return int(lengths[draw.randrange(len(lengths))])

    else:
        name, first, second = _distribution(source)

        def next_length() -> int:
            try:
                return max(1, int(min(DISTRIBUTIONS[name](draw, first, second), seq_length)))
            except OverflowError:
                return seq_length

    fill = _packed if by_length else _in_order
    filled = fill(next_length, seq_length, BATCHES * rows)
    batches = [filled[first : first + rows] for first in range(0, BATCHES * rows, rows)]
    typical = sorted(batches, key=lambda batch: sum(map(_area, batch)))[BATCHES // 2]
    return typical if rows > 1 else typical[0]


def _area(ends: Boundaries) -> int:
    return sum((stop - start) ** 2 for start, stop in zip(ends, ends[1:]))


def _in_order(next_length: Callable[[], int], seq_length: int, rows: int) -> tuple[Boundaries, ...]:
    return tuple(_filled(next_length, seq_length) for _ in range(rows))


def _packed(next_length: Callable[[], int], seq_length: int, rows: int) -> tuple[Boundaries, ...]:
    """``rows`` rows of whole documents packed by length."""
    lengths = [min(seq_length, next_length())]
    while sum(lengths) < (rows - 1) * seq_length + 1:
        lengths.append(min(seq_length, next_length()))
    found = []
    for row in pack_documents(lengths, 1, seq_length)[:rows]:
        ends = offsets(lengths[place] for place in row)
        found.append(tuple(ends if ends[-1] == seq_length else [*ends, seq_length]))
    return tuple(found)


def _filled(next_length: Callable[[], int], seq_length: int) -> Boundaries:
    ends = [0]
    while ends[-1] < seq_length:
        ends.append(min(seq_length, ends[-1] + next_length()))
    return tuple(ends)


def _distribution(source: str) -> tuple[str, float, float]:
    name, _, numbers = source.partition(":")
    try:
        first, second = map(float, numbers.split(","))
    except ValueError:
        first = second = 0.0
    if name not in DISTRIBUTIONS or not (0 < first < math.inf and 0 < second < math.inf):
        raise ValueError(f"--documents {source} is not known; {USAGE}.")
    return name, first, second


def read_lengths(path: str) -> NDArray[np.int32]:
    """int32 (documents,): tokens of every non-empty sequence of a Megatron indexed dataset.

    Raises:
        ValueError: the file cannot be read, or is not a complete index.
    """
    try:
        lengths = read_index(path).lengths
    except OSError as error:
        raise ValueError(f"--documents {path} cannot be read ({error.strerror}); {USAGE}.") from error
    except ValueError as error:
        raise ValueError(f"--documents {path} {error}; {USAGE}.") from None
    return lengths[lengths > 0]
