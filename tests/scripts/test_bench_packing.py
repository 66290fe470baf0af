"""What scripts/bench packing compares with: a bound that nothing is below, and the rules of the schedulers."""

import itertools

import pytest
from figures.packing_models import dynamic, least_rows, received_rows, static

from mindspeed_cp.sequence.balance import balanced_rings


def rows_of(owner, lengths):
    """(rows that ranks receive, largest area) of an owner for each token; causal."""
    rows, areas, start = 0, {}, 0
    for length in lengths:
        held = owner[start : start + length]
        for place, rank in enumerate(held):
            areas[rank] = areas.get(rank, 0) + place + 1
        for rank in set(held):
            last = max(place for place, other in enumerate(held) if other == rank) + 1
            rows += sum(other != rank for other in held[:last])
        start += length
    return rows, max(areas.values())


@pytest.mark.parametrize("lengths", [[8], [6, 2], [5, 3], [4, 4], [3, 3, 2], [7, 1], [2, 2, 2, 2]])
def test_no_cut_of_a_row_sends_fewer_rows_than_the_bound(lengths):
    total = sum(n * (n + 1) // 2 for n in lengths)
    possible = []
    for first in itertools.combinations(range(8), 4):
        rows, area = rows_of([0 if place in first else 1 for place in range(8)], lengths)
        if area <= 1.05 * total / 2:
            possible.append(rows)
    assert not possible or least_rows(lengths, 2) <= min(possible)


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_the_bound_is_below_what_is_sent_and_not_far(ranks):
    lengths = [2000, 700, 300, 250, 200, 90, 60]
    documents = (0, *itertools.accumulate(lengths))
    sent = received_rows(balanced_rings(documents, ranks), documents).sum()
    assert 0.6 * sent <= least_rows(lengths, ranks) <= sent


def test_groups_of_the_dynamic_scheduler_follow_the_lengths():
    # One document on two ranks and a short one on each other: all in one micro batch.
    count = dynamic([16, 8, 8], ranks=4, tokens=8)
    assert (count.makespan, count.rows) == (4 * 128 / 384, (2 - 1) * 16 / 32)
    # Two of them fill the ranks: the third document waits, and gets all four in the next micro batch.
    count = dynamic([16, 16, 16], ranks=4, tokens=8)
    assert (count.makespan, count.rows) == (pytest.approx(4 * (128 + 64) / 768), (1 + 1 + 3) * 16 / 48)


def test_static_groups_wait_for_the_heaviest_and_take_no_document_that_is_too_long():
    count = static([8, 4, 4], ranks=4, tokens=4, cp_size=2)
    assert (count.makespan, count.rows) == (4 * 32 / 96, 1)
    assert static([9], ranks=4, tokens=4, cp_size=2) is None
