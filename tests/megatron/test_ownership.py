"""Names that the adaptor has patched, in the hands of others: said by the report, and refused where they count."""

import pytest
from adaptor_runs import observe

pytestmark = [pytest.mark.cpu_only, pytest.mark.megatron]
FORWARD = "megatron.core.transformer.dot_product_attention.DotProductAttention.forward"


@pytest.fixture(scope="module")
def facts():
    return observe("owners", "owner_runs")


def test_what_nobody_touched_passes(facts):
    assert facts["untouched"] == ("applied", "")


def test_somebody_who_calls_ours_passes_and_is_named(facts):
    status, message = facts["wrapped"]
    assert status.startswith("wrapped by toy_profiler.") and message == ""


@pytest.mark.parametrize("when", ["replaced", "groups"])
def test_somebody_who_does_not_is_refused_before_context_parallelism_is_announced(facts, when):
    status, message = facts[when]
    assert status == "replaced by toy_thief.forward (/somewhere/toy_thief.py)"
    says = [FORWARD, status, "attention over the whole sequence", "Import toy_thief before"]
    assert [part for part in says if part not in message] == []


def test_a_name_that_only_helps_others_does_not_count(facts):
    assert facts["cosmetic"] == ("applied", "")


def test_a_class_of_mindspeed_is_named_with_what_to_do_and_nothing_is_changed():
    message, changed = observe("mindspeed_first", "owner_runs")
    says = ["MindSpeedCPDotProductAttention of mindspeed.core.context_parallel.dot_product_attention",
            "/somewhere/mindspeed/core/context_parallel/dot_product_attention.py", "has no 'forward' of its own",
            "MindSpeed takes these names", "start it without them", "No patch was applied"]  # fmt: skip
    assert [part for part in says if part not in message] == [] and "Install a version" not in message
    assert changed == []
