"""All pairs: of a large product the default run takes a few points in which every two values meet; --full takes all."""

import random
from itertools import combinations, product

ATTEMPTS = 3  # how many ways to fill a row are compared

_whole = False


def take_whole_products(whole):
    """What ``drawn`` gives from now on; pytest's option --full calls it once."""
    global _whole
    _whole = whole


def drawn(*parameters, seed=0):
    """Points of the product of ``parameters`` (sequences of values): all of them with --full.

    Otherwise as many as it takes for every value of a parameter to meet every value of every other one; always the
    same ones.
    """
    if _whole or len(parameters) < 3:
        return list(product(*parameters))
    rows = all_pairs([len(values) for values in parameters], seed)
    return [tuple(values[index] for values, index in zip(parameters, row)) for row in rows]


def all_pairs(sizes, seed=0):
    """Tuples of indices, index i below sizes[i], in which any two parameters take every pair of their values."""
    rng = random.Random(seed)
    left = {
        ((a, i), (b, j))
        for a, b in combinations(range(len(sizes)), 2)
        for i, j in product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while left:
        start = min(left)
        row = max((_filled(start, sizes, left, rng) for _ in range(ATTEMPTS)), key=lambda row: len(left & _met(row)))
        left -= _met(row)
        rows.append(row)
    return sorted(rows)


def _met(row):
    """The pairs that meet in this row."""
    return set(combinations(enumerate(row), 2))


def _filled(pair, sizes, left, rng):
    """A row that holds this pair; the other parameters, in random order, take what meets most that is left to meet."""
    row = dict(pair)
    others = [parameter for parameter in range(len(sizes)) if parameter not in row]
    for parameter in rng.sample(others, len(others)):

        def gain(value, parameter=parameter):
            return sum(tuple(sorted(((parameter, value), fixed))) in left for fixed in row.items()), rng.random()

        row[parameter] = max(range(sizes[parameter]), key=gain)
    return tuple(row[parameter] for parameter in range(len(sizes)))
