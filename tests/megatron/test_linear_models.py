"""Models whose layers have a state or a sparse indexer: loss, gradients and updates equal those without context
parallelism.
"""

import pytest
from distributed import run_ranks
from linear_models import LINEAR_CASES, compare_all, tensor_parallel
from megatron_version import MINOR
from model_cases import HYBRID, RING, ULYSSES, possible
from pairs import whole
from trainer_runs import IMPORTED

CASES = possible(LINEAR_CASES)
pytestmark = [
    pytest.mark.megatron,
    pytest.mark.cpu_only,
    pytest.mark.skipif(not CASES, reason="this version has no such layers"),
]
DELTA = tuple(name for name in CASES if name.startswith("delta"))
ONE_HEAD = "delta nets, one head"
SPARSE = tuple(name for name in CASES if name.startswith("sparse"))
FEW = tuple(name for name in CASES if name in ("delta nets", "delta nets, packed"))
UNEVEN = {"algorithm": ULYSSES, "gather_size_calculator": "dynamic"}


def run(size, cases, **settings):
    return {"context_parallel_size": size, **settings}, cases


# Ranks -> length -> name of the run -> (settings, cases).
RUNS = {
    2: {
        31: {
            "ulysses, heads": run(2, tuple(name for name in DELTA if name != ONE_HEAD), **UNEVEN),
            "ring, state": run(2, DELTA, algorithm=RING, linear_exchange="state"),
            "ring": run(2, SPARSE, algorithm=RING),
            "ulysses": run(2, SPARSE[:1], **UNEVEN),
        },
    },
    4: {
        32: {
            "hybrid, heads": run(4, FEW, algorithm=HYBRID, ulysses_degree=2),
            "ring, state": run(4, FEW, algorithm=RING, linear_exchange="state"),
            "ring, documents balanced, state": run(
                4, FEW[1:], algorithm=RING, batch_layout="balanced", linear_exchange="state"
            ),
            "all-gather, sparse": run(4, SPARSE[:2], algorithm="kvallgather_cp_algo"),
        }
    },
}
REFUSED = [(ONE_HEAD, 31, {"context_parallel_size": 2, "algorithm": RING})]
EXACT = [
    (count, name, case)
    for count, lengths in RUNS.items()
    for runs in lengths.values()
    for name, (_, chosen) in runs.items()
    for case in chosen
    if count == 2 or whole()
]


@pytest.fixture(scope="module")
def world():
    """count -> results of every rank."""
    found = {}

    def results(count):
        if count not in found:
            arguments = RUNS[count], CASES, REFUSED if count == 2 else []
            found[count] = run_ranks(count, compare_all, *arguments, timeout=400, fresh=True, imported=IMPORTED)
        return found[count]

    return results


@pytest.mark.parametrize(("count", "name", "case"), EXACT)
def test_loss_and_gradients_equal_those_without_context_parallelism(world, count, name, case):
    for rank, _ in world(count):
        loss, grad_norm, gradient, parameter = rank[name][case]
        assert loss < 1e-5 and grad_norm < 1e-5 and gradient < 2e-5, (loss, grad_norm, gradient, parameter)


def test_fewer_heads_than_ranks_are_refused_by_heads_with_the_way_out(world):
    for _, said in world(2):
        assert "--cp-linear-exchange heads needs a value head of gated delta nets for each of the 2" in said[ONE_HEAD]
        assert "use --cp-linear-exchange state" in said[ONE_HEAD]


def test_one_layer_beside_tensor_and_sequence_parallelism_equals_one_without_context_parallelism():
    ranks = run_ranks(4, tensor_parallel, timeout=200, fresh=True, imported=IMPORTED)
    kinds = {kind for kind, _ in ranks[0]}
    assert "delta net" in kinds and (MINOR < (0, 18) or "mixer" in kinds)
    for rank in ranks:
        assert set(rank) == {(kind, way) for kind in kinds for way in ("heads", "state")}
        assert all(value < 1e-5 for value in rank.values()), rank
