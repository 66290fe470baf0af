"""All setups of all algorithms at all sizes, and the pairwise selection for the default run."""

from functools import cache
from itertools import product

import pairs
import pytest

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.settings.algorithms import ALGORITHMS

SIZES = list(range(1, 9))


def shapes(algorithm, cp):
    """Every (degree, window) of an algorithm at this size, as keyword arguments of the configuration."""
    row = ALGORITHMS[algorithm]
    degrees = [d for d in range(2, cp) if cp % d == 0] if row.takes_degree else [None]
    for degree in degrees:
        ring = cp // (degree or 1)
        for window in [1] + [w for w in range(2, ring) if ring % w == 0 and row.takes_window]:
            yield {
                "context_parallel_size": cp,
                "algorithm": algorithm,
                **({"ulysses_degree": degree} if degree else {}),
                **({"window_size": window} if window > 1 else {}),
            }


def exchanges(shape):
    any_peer = ALGORITHMS[shape["algorithm"]].exchange == "ring" and "window_size" not in shape
    return ["ring", "direct", "mesh"] if any_peer else ["ring"]


def setups(algorithm, cp):
    """Every (degree, window, exchange) of an algorithm at this size, as keyword arguments of the configuration."""
    return [{**shape, "kv_exchange": exchange} for shape in shapes(algorithm, cp) for exchange in exchanges(shape)]


def degree_of(shape):
    return ContextParallelConfig(**shape).hierarchy[0]


def has_ring(shape):
    return ALGORITHMS[shape["algorithm"]].exchange is not None


def variants(algorithm, cp):
    """Every (degree, window, exchange, policy, overlap) of an algorithm."""
    for shape in shapes(algorithm, cp):
        for exchange in exchanges(shape):
            for policy in (None, "full", "half"):
                yield {
                    **shape,
                    "kv_exchange": exchange,
                    "kv_cache_policy": policy,
                    **({"send_recv_overlap": True} if algorithm != "ulysses_cp_algo" else {}),
                }


def algorithms_at(cp):
    return [algorithm for algorithm in ALGORITHMS if any(shapes(algorithm, cp))]


ALGORITHM_AND_SIZE = [
    pytest.param(algorithm, cp, id=f"{algorithm}-cp{cp}") for cp in SIZES for algorithm in algorithms_at(cp)
]
for_every_algorithm = pytest.mark.parametrize("algorithm, cp", ALGORITHM_AND_SIZE)
# For tests that are not about the size itself: without 5, 6 and 7; all with --full.
SOME_SIZES = [param for param in ALGORITHM_AND_SIZE if pairs.whole() or param.values[1] in (1, 2, 3, 4, 8)]


def kind_of(setup):
    """(algorithm, exchange, whether it has windows)."""
    return setup["algorithm"], setup["kv_exchange"], "window_size" in setup


KINDS = list(dict.fromkeys(kind_of(setup) for param in ALGORITHM_AND_SIZE for setup in setups(*param.values)))


def of_kind(kind, cp):
    return [setup for setup in setups(kind[0], cp) if kind_of(setup) == kind]


def drawn(algorithm, cp, *features):
    """(setup, *values) of this algorithm and size; over all, every pair of values, kinds and sizes occurs."""
    if pairs.whole():
        return product(setups(algorithm, cp), *features)
    return _drawn(features)[algorithm, cp]


@cache
def _drawn(features):
    """(algorithm, size) -> results of ``drawn``; a kind is set up with its lowest or highest degree and window."""
    rows = pairs.all_pairs(
        (len(KINDS), len(SIZES), 2, *map(len, features)),
        fits=lambda kind, size: bool(of_kind(KINDS[kind], SIZES[size])),
    )
    found = {param.values: [] for param in ALGORITHM_AND_SIZE}
    for kind, size, end, *rest in rows:
        setup = of_kind(KINDS[kind], SIZES[size])[-end]
        values = [feature[index] for feature, index in zip(features, rest)]
        found[setup["algorithm"], SIZES[size]].append((setup, *values))
    return found
