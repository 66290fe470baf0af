"""Multi-latent attention of Megatron whose latents travel: hidden states, all gradients, bytes."""

import pytest
from distributed import run_ranks
from latent_runs import RUNS, SPLIT, compare, runs
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]


def check(ranks):
    wrong = [
        (rank, name, *found)
        for rank, results in enumerate(ranks)
        for name, found in results.items()
        if not found[0] < 1e-10 or (found[2] and found[1] != found[2])
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_hidden_states_and_all_gradients_equal_those_of_one_process():
    check(run_ranks(2, compare, runs(RUNS), timeout=200, fresh=True, imported=IMPORTED))


def test_latents_travel_beside_tensor_and_sequence_parallelism():
    check(run_ranks(4, compare, runs(SPLIT), timeout=200, fresh=True, imported=IMPORTED))
