"""Pairwise testing: the default run tests few points of a large product that contain all pairs; --full tests all."""

import random
from itertools import combinations, product

ATTEMPTS = 3  # candidates for a row that are compared

_whole = False


def take_whole_products(whole):
    """Set whether ``drawn`` returns whole products; pytest's option --full calls it once."""
    global _whole
    _whole = whole


def whole():
    """Whether products are taken whole."""
    return _whole


def drawn(*parameters):
    """Points of the product of ``parameters`` (sequences of values): all of them with --full.

    Otherwise few points that contain every pair of values of any two parameters; always the same ones.
    """
    if _whole or len(parameters) < 3:
        return list(product(*parameters))
    return [
        tuple(values[index] for values, index in zip(parameters, row)) for row in all_pairs([*map(len, parameters)])
    ]


def all_pairs(sizes, seed=0, fits=lambda first, second: True):
    """Tuples of indices, index i below sizes[i], that contain every pair of values of any two parameters.

    ``fits(i, j)``: whether value i of the first parameter may be combined with value j of the second.
    """
    rng = random.Random(seed)
    left = {
        ((a, i), (b, j))
        for a, b in combinations(range(len(sizes)), 2)
        for i, j in product(range(sizes[a]), range(sizes[b]))
        if (a, b) != (0, 1) or fits(i, j)
    }
    rows = []
    while left:
        start = min(left)
        attempts = [_filled(start, sizes, left, rng, fits) for _ in range(ATTEMPTS)]
        rows.append(max(attempts, key=lambda row: len(left & _met(row))))
        left -= _met(rows[-1])
    return sorted(rows)


def _met(row):
    """The pairs in this row."""
    return set(combinations(enumerate(row), 2))


def _filled(pair, sizes, left, rng, fits):
    """A row with this pair; the other parameters, in random order, take the values that cover most missing pairs."""
    row = dict(pair)
    others = [parameter for parameter in range(len(sizes)) if parameter not in row]
    for parameter in rng.sample(others, len(others)):

        def possible(value, parameter=parameter):
            chosen = {**row, parameter: value}
            return parameter > 1 or not {0, 1} <= set(chosen) or fits(chosen[0], chosen[1])

        def gain(value, parameter=parameter):
            return sum(tuple(sorted(((parameter, value), fixed))) in left for fixed in row.items()), rng.random()

        row[parameter] = max(filter(possible, range(sizes[parameter])), key=gain)
    return tuple(row[parameter] for parameter in range(len(sizes)))
