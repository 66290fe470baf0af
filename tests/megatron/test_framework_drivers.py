"""A training loop like verl's, which splits packed documents itself, trains to cp=1's losses."""

import driver_runs
import pytest
from distributed import run_ranks
from driver_runs import ALGORITHMS, STEPS
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]


@pytest.fixture(scope="module")
def losses():
    return run_ranks(4, driver_runs.train, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_framework_that_splits_packed_batches_itself_trains_to_the_losses_without_context_parallelism(
    losses, algorithm
):
    for ranks in losses:
        expected, found = ranks["cp=1"], ranks[algorithm]
        assert len(found) == STEPS and found == pytest.approx(expected, rel=1e-5)
        assert abs(expected[0] - expected[-1]) > 1e-3
