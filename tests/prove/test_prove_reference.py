"""Context parallelism that is not ours is compared in the same way: a script with its own, right and broken."""

import pytest
from prove_orders import proofs
from trainer_runs import REPOSITORY

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
SCRIPT = str(REPOSITORY / "tests" / "helpers" / "own_parallelism.py")
FLAGS = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64"]


@pytest.fixture(scope="module")
def verdicts():
    """fault -> verdict"""
    commands = {fault: [*FLAGS, "--fault", fault] for fault in ("none", "mask", "positions")}
    return proofs(SCRIPT, commands, ours=False, steps=1)


def test_a_script_whose_own_parallelism_is_right_is_equal(verdicts):
    found = verdicts["none"]
    assert found.equal, found.failure or found.comparison.differences
    assert found.comparison.counted["output"] > 10 and found.comparison.counted["gradient"] > 10


@pytest.mark.parametrize(
    ("fault", "module"),
    [("mask", "layers.0.self_attention.core_attention"), ("positions", "embedding.position_embeddings")],
)
def test_a_fault_of_its_own_is_found_and_its_module_named(verdicts, fault, module):
    found = verdicts[fault]
    assert found.comparison is not None, found.failure
    assert not found.equal and module in found.comparison.first("output").name
