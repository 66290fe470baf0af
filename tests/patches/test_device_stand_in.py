"""The stand-in for torch.cuda on machines without an accelerator: what each name means on a CPU, and that it goes
again.
"""

import os

import pytest
from adaptor_runs import observe

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]


@pytest.fixture(scope="module")
def facts():
    return observe("stand_in", "stand_in_runs", MINDSPEED_CP_DEVICE="cpu")


def test_the_variable_switches_it_on_although_cuda_is_there(facts):
    assert facts["rows"] and set(facts["rows"].values()) == {"applied"}


@pytest.mark.parametrize(
    "what",
    [
        "current_device",
        "device of index",
        "device of name",
        "factory",
        "index",
        "like",
        "to",
        "to_index",
        "to_keyword",
        "module",
        "tensor.cuda",
        "new_zeros",
    ],
)
def test_a_cuda_device_is_the_cpu(facts, what):
    assert facts["devices"][what] == "cpu"


def test_other_arguments_and_devices_are_left_as_they_are(facts):
    assert facts["meta"] == "meta" and facts["to_dtype"] == "torch.float64" and facts["pinned"] == [1.0, 1.0]


def test_the_cuda_random_state_is_that_of_the_cpu(facts):
    assert facts["seeded"] and facts["state_restored"] and facts["generator_is_cpu"] and facts["lazy_call_runs"]


def test_streams_and_events_have_nothing_to_wait_for(facts):
    assert facts["streams"] == [True, True, 0.0, 5]


def test_type_names_are_those_of_cuda_as_optimizers_compare_them(facts):
    assert facts["type"] == "torch.cuda.FloatTensor" and facts["cast"] == "torch.float64"


def test_compile_returns_the_function(facts):
    assert facts["compiled"] == [True, True]


def test_scripted_functions_call_torchs_factories_with_the_stand_in_and_after_it(facts):
    assert facts["scripted"] == [[12.0] * 3, None, [12.0] * 3]


def test_the_memory_of_the_device_is_that_of_the_machine(facts):
    free, total = facts["memory"]
    assert 0 < free <= total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_stage_keeps_what_gloo_still_sends(facts):
    assert facts["frees what is sent"] is False


def test_nccl_is_gloo_and_device_arguments_are_dropped(facts):
    assert facts["backends"] == ["gloo", "gloo", "gloo"]


def test_sequence_parallel_norms_mark_their_parameters(facts):
    assert facts["norm"] == ["LayerNorm", True, True, False]


def test_forking_the_random_state_does_not_warn_and_restores_it(facts):
    assert facts["fork"] == [True, [], True]


def test_undo_brings_the_error_of_a_build_without_cuda_back(facts):
    assert "cuda" in facts["after_undo"].lower()
