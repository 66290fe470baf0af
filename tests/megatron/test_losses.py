"""Losses in every convention: gradients and reports equal those without context parallelism, or something is said."""

import pytest
from distributed import run_ranks
from loss_runs import CONVENTIONS, compare
from megatron_version import MINOR
from trainer_runs import IMPORTED

from mindspeed_cp.megatron.losses import Losses, Told, factor_of

pytestmark = pytest.mark.cpu_only
RIGHT = [name for name, (_, right) in CONVENTIONS.items() if right]
WHOLE = [name for name, (_, right) in CONVENTIONS.items() if "gathered" in name and not right]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, compare, timeout=200, fresh=True, imported=IMPORTED)


@pytest.mark.megatron
@pytest.mark.parametrize("convention", RIGHT)
def test_gradients_of_a_right_loss_equal_those_without_context_parallelism_and_nothing_is_said(ranks, convention):
    for rank in ranks:
        norm, worst, _, said = rank[convention]
        assert worst < 1e-5 and abs(norm - 1) < 1e-5 and said == []


@pytest.mark.megatron
@pytest.mark.parametrize("convention", [*RIGHT, *WHOLE])
def test_an_evaluation_that_divides_on_every_rank_reports_the_loss_of_the_sequence(ranks, convention):
    for rank in ranks:
        loss, count = rank[convention][2]
        # Who gathers reports the whole sequence on every rank, which Megatron adds up; the loss is the same.
        assert abs(loss - 1) < 1e-5 and count == (2 if "gathered" in convention else 1)


@pytest.mark.megatron
@pytest.mark.parametrize("convention", WHOLE)
def test_a_whole_loss_with_the_whole_count_is_said_at_the_first_step(ranks, convention):
    norm, _, _, said = ranks[0][convention]
    if MINOR < (0, 13):  # which adds no counts over these ranks
        assert abs(norm - 1) < 1e-5 and said == []
        return
    assert abs(norm - 1 / 2) < 1e-5
    assert len(said) == 1 and "exactly 1 / 2" in said[0] and "share_of(num_tokens)" in said[0]
    assert ranks[1][convention][3] == [], "one rank of a group says it"


@pytest.mark.megatron
def test_a_local_mean_of_two_values_is_said_at_the_first_step(ranks):
    norm, _, _, said = ranks[0]["local mean"]
    assert norm > 1.9 and len(said) == 1
    assert "exactly 2 times" in said[0] and "token count of the whole sequence" in said[0]


# (loss, count, value, tokens) of each rank; whether Megatron adds counts; factor.
TOLD = {
    "sums over local counts": ([(6, 3, 6, 3), (4, 2, 4, 2)], True, 1),
    "parts of a mean": ([(6 / 5, None, 6, 3), (4 / 5, None, 4, 2)], True, 1),
    "means of ranks": ([(2, None, 2, None), (3, None, 3, None)], True, 2),
    "means of ranks, which report the reduced one": ([(2, None, 2.5, None), (3, None, 2.5, None)], True, 2),
    "a whole mean": ([(2, None, 10, 5), (2, None, 10, 5)], True, 1),
    "a whole sum over shares": ([(10, 3, 10, 5), (10, 2, 10, 5)], True, 1),
    "a whole sum over whole counts": ([(10, 5, 10, 5), (10, 5, 10, 5)], True, 1 / 2),
    "the same where counts are not added": ([(10, 5, 10, 5), (10, 5, 10, 5)], False, 1),
    "sums over whole counts where counts are not added": ([(6, 5, 6, 3), (4, 5, 4, 2)], False, 1),
    "a report of something else": ([(6, 3, 71, None), (4, 2, 71, None)], True, None),
    "no report": ([(6, 3, None, None), (4, 2, None, None)], True, None),
    "nothing with loss": ([(0, 0, 0, 0), (0, 0, 0, 0)], True, None),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_trains_is_compared_with_what_is_reported(name):
    ranks, counts_are_added, factor = TOLD[name]
    assert factor_of([Told(*rank) for rank in ranks], counts_are_added) == factor


def test_a_whole_loss_that_reports_nothing_is_said_unless_a_share_was_asked_for():
    losses, ranks = Losses(), [Told(10, 5, None, None), Told(10, 5, None, None)]
    assert "share_of" in losses.said(ranks, True) and losses.said(ranks, False) == ""
    losses.asked = True
    assert losses.said(ranks, True) == ""
