"""The proof proves: on sound code every model is equal, and every fault that is put back is found and named."""

import pytest
from distributed import RankFailure, run_ranks
from prove_faults import FAULTS, possible
from prove_models import MODELS
from prove_models import possible as possible_models
from prove_runs import prove_all, prove_as_a_framework
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
FOUND = tuple(possible(possible_models()))


@pytest.fixture(scope="module")
def results():
    """({model: (JSON, text)}, {fault: (JSON, text)}) of rank 0."""
    try:
        return run_ranks(2, prove_all, 2, timeout=400, fresh=True, imported=IMPORTED)[0]
    except RankFailure as failure:
        pytest.fail(str(failure))


@pytest.mark.parametrize("model", tuple(possible_models()))
def test_a_sound_model_is_equal(results, model):
    found, text = results[0][model]
    assert found["equal"], text
    assert found["compared"]["output"] > 10 and found["compared"]["gradient"] > 10 and found["compared"]["loss"] == 2
    assert found["largest_error"]["output"] < 1e-5, text


@pytest.mark.parametrize("name", FOUND)
def test_a_fault_is_found_and_its_module_named(results, name):
    fault, (found, text) = FAULTS[name], results[1][name]
    assert not found["equal"], text
    module, parameter = found["first_module"], found["first_parameter"]
    assert fault.module in (module or {"name": ""})["name"] and bool(fault.module) == bool(module), text
    assert parameter is not None and fault.parameter in parameter["name"], text
    if fault.kind:
        assert (module or parameter)["signature"] == fault.kind, text


def test_there_are_faults_of_every_model_that_has_a_part_of_its_own():
    assert len(FAULTS) >= 20
    assert (
        {"packed", "window", "sinks", "experts", "multi-token prediction"}
        <= {fault.model for fault in FAULTS.values()}
        <= set(MODELS)
    )


def test_a_framework_gets_the_same_verdict_on_every_rank():
    """By the example of the documentation."""
    first, second = run_ranks(2, prove_as_a_framework, 2, timeout=200, fresh=True, imported=IMPORTED)
    assert first[0] == second[0] and not second[1]
    (equal, counted), printed, refusal = first
    assert equal and counted["output"] > 10 and counted["loss"] == 1
    assert "\nEQUAL: prove: cp=2 against cp=1\n" in printed
    assert "context_parallel_size 4 must be the number of ranks, 2" in refusal
