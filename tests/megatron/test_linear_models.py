"""Models whose layers have a state: loss, gradients and updates equal those without context parallelism."""

import pytest
from distributed import RankFailure, run_ranks
from linear_models import LINEAR_CASES
from model_cases import RING, ULYSSES, possible
from model_runs import compare
from trainer_runs import IMPORTED

CASES = possible(LINEAR_CASES)
pytestmark = [
    pytest.mark.megatron,
    pytest.mark.cpu_only,
    pytest.mark.skipif(not CASES, reason="this version has no such layers"),
]
DYNAMIC = {"gather_size_calculator": "dynamic"}
DELTA = tuple(name for name in CASES if name.startswith("delta"))
HEADS, STATE = {"linear_exchange": "heads"}, {"linear_exchange": "state"}
# Ranks -> (length, name of the run -> (settings, cases)); lengths of two ranks are uneven.
RUNS = {
    2: (
        31,
        {
            "ulysses, heads": ({"context_parallel_size": 2, "algorithm": ULYSSES, **DYNAMIC, **HEADS}, DELTA),
            "ring, state": ({"context_parallel_size": 2, "algorithm": RING, **STATE}, DELTA),
        },
    ),
}
EXACT = [
    (count, name, case) for count, (_, runs) in RUNS.items() for name, (_, chosen) in runs.items() for case in chosen
]


@pytest.fixture(scope="module")
def world():
    """count -> results of every rank; a world starts once, also when it fails."""
    found = {}

    def results(count):
        if count not in found:
            try:
                imported = ("fake_fla", *IMPORTED)
                found[count] = run_ranks(
                    count, compare, *RUNS[count], CASES, timeout=400, fresh=True, imported=imported
                )
            except RankFailure as failure:
                found[count] = failure
        if isinstance(found[count], RankFailure):
            raise found[count]
        return found[count]

    return results


@pytest.mark.parametrize(("count", "name", "case"), EXACT)
def test_loss_and_gradients_equal_those_without_context_parallelism(world, count, name, case):
    for rank in world(count):
        loss, grad_norm, gradient, parameter = rank[name][case]
        assert loss < 1e-5 and grad_norm < 1e-5 and gradient < 2e-5, (loss, grad_norm, gradient, parameter)
