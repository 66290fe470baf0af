"""ms-swift, verl and Megatron-Bridge train with every algorithm to their own numbers without context parallelism."""

import functools

import parity
import pytest
from algorithms import ALGORITHMS

pytestmark = pytest.mark.cpu_only
run = functools.cache(parity.run)
CASES = [
    pytest.param(framework, order, subject, batch, id=f"{framework} {order} {subject} {batch}")
    for (framework, order), (subjects, batches) in parity.SUBJECTS.items()
    for subject in subjects
    for batch in batches
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("framework, order, subject, batch", CASES)
def test_a_framework_trains_to_its_own_numbers_without_context_parallelism(framework, order, subject, batch, algorithm):
    assert parity.difference(run(framework, order), subject, batch, algorithm) < parity.BOUND
