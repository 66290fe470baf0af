"""Documents on any number of ranks: what one row over all ranks costs beside groups of ranks for each length.

``python scripts/bench packing``

For Megatron's example of dynamic context parallelism and those of ``bench documents`` it draws the
documents of a step of eight rows and prints, exactly counted, the attention makespan (the sum over rows or micro
batches of the largest area of a rank) over the ideal, and the rows of keys and values that ranks receive for each
token. The last column is a bound that no way of cutting the same rows can be below.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from bench.measuring import head, row

from figures.documents import DISTRIBUTIONS
from figures.packing_models import Count, dynamic, in_order, least_rows, received_rows, static
from mindspeed_cp import pack_documents
from mindspeed_cp.sequence.balance import balanced_rings, imbalance
from mindspeed_cp.sequence.slice_mask import document_mask

EXAMPLE = "Megatron's example"  # log-normal, mean 1,024 and sigma 1.5, cut off at 128 and 8,192; 2,048 tokens a rank
ROWS = 8  # of a step, where documents fill them without a gap


def drawn(name: str, ranks: int, tokens: int, seed: int) -> list[int]:
    """Lengths of the documents of a step, in random order."""
    draw, room = random.Random(seed), ROWS * ranks * tokens
    lengths = [ranks * tokens // 2] * ROWS if name == "one long and many short" else []
    while sum(lengths) < room:
        if name == EXAMPLE:
            lengths.append(min(8192, max(128, int(draw.lognormvariate(math.log(1024) - 1.5**2 / 2, 1.5)))))
        else:
            lengths.append(min(ranks * tokens, max(1, DISTRIBUTIONS[name](draw, ranks * tokens))))
    draw.shuffle(lengths)
    return lengths


def balanced(rows: Sequence[Sequence[int]], ranks: int) -> Count:
    """One row after the other over all ranks."""
    areas = [sum(n * (n + 1) // 2 for n in row) for row in rows]
    span = received = least = 0.0
    for lengths, area in zip(rows, areas):
        documents = (0, *accumulate(lengths))
        rings = balanced_rings(documents, ranks)
        span += imbalance(rings, document_mask(None, 0, documents)) * area
        received += int(received_rows(rings, documents).sum())
        least += least_rows(lengths, ranks)
    tokens = sum(map(sum, rows))
    return Count(span / sum(areas), received / tokens, least / tokens)


WAYS = ("static, cp 4", "Megatron's dynamic groups", "balanced, rows as they come", "balanced, packed by length")


def ways(lengths: list[int], ranks: int, tokens: int) -> list[Count | None]:
    """What each of WAYS costs."""
    packed = [[lengths[place] for place in places] for places in pack_documents(lengths, ranks, tokens)]
    return [
        static(lengths, ranks, tokens),
        dynamic(lengths, ranks, tokens),
        balanced(in_order(lengths, ranks, tokens), ranks),
        balanced(packed, ranks),
    ]


def print_table(options: argparse.Namespace) -> None:
    print(f"{ROWS} rows of ranks x {options.tokens} tokens, up to {options.seeds} steps of each\n")
    head("documents", "ranks:", *(f"{way}:" for way in WAYS), "at least:")
    for name in options.documents:
        for ranks in options.ranks:
            seeds = max(1, min(options.seeds, 64 * options.seeds // ranks))
            steps = [ways(drawn(name, ranks, options.tokens, seed), ranks, options.tokens) for seed in range(seeds)]
            cells = [cell([step[way] for step in steps]) for way in range(len(WAYS))]
            least = statistics.mean(step[-1].least for step in steps if step[-1] is not None)
            row(name, ranks, *cells, f"{least:.2f}")


def cell(counts: Sequence[Count | None]) -> str:
    found = [count for count in counts if count is not None]
    if not found:
        return "too long"
    return f"{statistics.mean(c.makespan for c in found):.2f}, {statistics.mean(c.rows for c in found):.2f}"


def print_planning() -> None:
    """How long a rank takes to find the layout of a row."""
    lengths = [DISTRIBUTIONS["short"](random.Random(seed), 0) for seed in range(20_000)]
    seconds = []
    for turn in range(5):
        documents = (0, *accumulate(lengths[turn:] + lengths[:turn]))
        start = time.perf_counter()
        balanced_rings(documents, 256)
        seconds.append(time.perf_counter() - start)
    print(f"\nlayout of {len(lengths)} documents on 256 ranks: {min(seconds) * 1e3:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [EXAMPLE, *DISTRIBUTIONS]
    parser.add_argument("--documents", nargs="+", default=names, choices=names)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a rank")
    parser.add_argument("--seeds", type=int, default=6, help="steps drawn for each row of the table up to 64 ranks")
    options = parser.parse_args()
    np.seterr(all="raise")
    print_table(options)
    print_planning()
