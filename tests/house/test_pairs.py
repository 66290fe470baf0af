"""The points that the default run takes of a large product: every pair of values meets, and they stay the same."""

from itertools import combinations, product

import pairs
import pytest

SIZES = [(27, 9, 6, 5, 3, 2, 2, 2), (4, 5, 2), (1, 3, 2), (3, 3, 3, 3)]


@pytest.fixture
def whole():
    """--full for one test."""
    before = pairs._whole
    pairs.take_whole_products(True)
    yield
    pairs.take_whole_products(before)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_of_values_meets(sizes):
    rows = pairs.all_pairs(sizes)
    for a, b in combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(range(sizes[a]), range(sizes[b])))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_few_points_suffice(sizes):
    largest, second = sorted(sizes)[-1:-3:-1]
    assert len(pairs.all_pairs(sizes)) <= 1.4 * largest * second


def test_values_that_do_not_fit_never_meet_and_all_others_do():
    def fits(first, second):
        return (first + second) % 3 > 0

    rows = pairs.all_pairs((6, 5, 4, 2), fits=fits)
    assert {row[:2] for row in rows} == {(i, j) for i, j in product(range(6), range(5)) if fits(i, j)}
    for a, b in [*combinations(range(4), 2)][1:]:
        assert {(row[a], row[b]) for row in rows} == set(product(range((6, 5, 4, 2)[a]), range((6, 5, 4, 2)[b])))


def test_the_points_are_always_the_same():
    assert pairs.all_pairs(SIZES[0], seed=3) == pairs.all_pairs(SIZES[0], seed=3) != pairs.all_pairs(SIZES[0], seed=4)


def test_the_whole_product_is_taken_when_asked_for(whole):
    parameters = [{"a": 1}, {"a": 2}], "xyz", (None, True)
    assert pairs.drawn(*parameters) == list(product(*parameters))
