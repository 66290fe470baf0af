"""Megatron's attention class over fakes of three Transformer Engine releases: built by Megatron, computed here."""

from importlib.metadata import version

import pytest
from alone import run_alone
from fake_transformer_engine import RELEASES
from transformer_engine_runs import ALGORITHMS, run_release

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
SINKS = [f"{algorithm} {kind}" for algorithm in ALGORITHMS for kind in ("off-by-one", "learnable")]
MEGATRON = tuple(int(part) for part in version("megatron-core").split(".")[:2])


@pytest.fixture(scope="module", params=RELEASES)
def ranks(request):
    return run_alone(run_release, request.param)


def test_two_ranks_give_dense_attention_and_its_gradients(ranks):
    for rank in ranks:
        differences = rank["differences"]
        assert {f"{algorithm} causal" for algorithm in ALGORITHMS} <= differences.keys()
        assert {name: value for name, value in differences.items() if not value < 1e-12} == {}


def test_attention_sinks_are_compared_where_the_release_has_them(ranks, request):
    has_sinks = MEGATRON >= (0, 15) and request.node.callspec.params["ranks"] == "2.11.0"
    assert [name in ranks[0]["differences"] for name in SINKS] == [has_sinks] * len(SINKS)


def test_transformer_engine_computes_and_exchanges_nothing(ranks):
    assert [rank["calls"] for rank in ranks] == [dict.fromkeys(ALGORITHMS, [])] * 2


def test_megatron_builds_whole_layers_whose_attention_keeps_what_it_was_asked_for(ranks):
    assert [rank["layers"] for rank in ranks] == [[("TEDotProductAttention", True, True)] * 2] * 2


def test_dropout_is_the_layers_own_and_ends_with_training(ranks):
    assert [rank["dropout"] for rank in ranks] == [[True, False, False]] * 2


def test_what_only_transformer_engine_can_do_is_refused_by_name(ranks):
    assert len(ranks[0]["refused"]) == (8 if MEGATRON >= (0, 16) else 4)
    for name, message in ranks[0]["refused"].items():
        assert (
            name.removeprefix("dynamic ") in message.replace("--", "").replace("-", "_")
            and "not supported with context" in message
        )
        assert "leave it out, or use --context-parallel-size 1" in message


def test_alone_transformer_engine_gets_what_megatron_passes(ranks):
    assert [rank["alone"] for rank in ranks] == [("forward", True, "causal", "post_scale_bias")] * 2
