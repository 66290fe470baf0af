"""Packed documents for the planner: lengths from a dataset's index (PREFIX.idx) or a distribution, and rows filled with
them.
"""

import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the tokens, sequences, documents
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}  # Megatron's codes
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
        known = read_lengths(source)
        drawn: Iterator[int] = (int(known[draw.randrange(len(known))]) for _ in count())
    else:
        drawn = _drawn(draw, *_distribution(source), seq_length)
    fill = _packed if by_length else _in_order
    filled = fill((min(length, seq_length) for length in drawn), seq_length, BATCHES * rows)
    batches = [filled[first : first + rows] for first in range(0, BATCHES * rows, rows)]
    typical = sorted(batches, key=lambda batch: sum(map(_area, batch)))[BATCHES // 2]
    return typical if rows > 1 else typical[0]


def _area(ends: Boundaries) -> int:
    return sum((stop - start) ** 2 for start, stop in zip(ends, ends[1:]))


def _in_order(lengths: Iterator[int], seq_length: int, rows: int) -> tuple[Boundaries, ...]:
    return tuple(
        (*offsets(_until(seq_length, lengths))[:-1], seq_length)  # the last document is cut
        for _ in range(rows)
    )


def _until(total: int, lengths: Iterator[int]) -> list[int]:
    """The next lengths, as many as have at least ``total`` tokens together."""
    found, left = [], total
    while left > 0:
        found.append(next(lengths))
        left -= found[-1]
    return found


def _packed(drawn: Iterator[int], seq_length: int, rows: int) -> tuple[Boundaries, ...]:
    """``rows`` rows of whole documents packed by length."""
    lengths, found = _until((rows - 1) * seq_length + 1, drawn), []
    for row in pack_documents(lengths, 1, seq_length)[:rows]:
        ends = offsets(lengths[place] for place in row)
        found.append(tuple(ends if ends[-1] == seq_length else [*ends, seq_length]))
    return tuple(found)


def _drawn(draw: random.Random, name: str, first: float, second: float, seq_length: int) -> Iterator[int]:
    """Lengths of a distribution, without end."""
    while True:
        try:
            yield max(1, int(min(DISTRIBUTIONS[name](draw, first, second), seq_length)))
        except OverflowError:
            yield seq_length


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


@dataclass(frozen=True)
class Index:
    """Args:
    dtype: dtype of the tokens. lengths: int32 (sequences,), tokens of each. places: int64 (sequences,), byte offset
        of each in PREFIX.bin.
    """

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    places: NDArray[np.int64]


def read_index(path: str | Path) -> Index:
    """Read and check the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not valid; the message continues a sentence about it, such as "is empty".
    """
    data = Path(path).read_bytes()
    _require(len(data) > 0, "is empty")
    _require(data.startswith(MAGIC), "does not begin as Megatron's index files do (wrong magic)")
    _require(len(data) >= HEADER.size, f"ends within its header ({len(data)} of {HEADER.size} bytes)")
    _, version, code, sequences, documents = HEADER.unpack_from(data)
    _require(version == 1 and code in DTYPES, f"has version {version} and type code {code}")
    needed = HEADER.size + 12 * sequences + 8 * documents
    _require(len(data) >= needed, f"is truncated: {len(data):,} of {needed:,} bytes")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    _require(documents > 1 and int(lengths.sum(dtype=np.int64)) > 0, "counts no documents")
    places = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    return Index(np.dtype(DTYPES[code]), lengths, places)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
