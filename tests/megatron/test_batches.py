"""Batches as frameworks bring them, through Megatron's own models: losses and gradients are those without context
parallelism.
"""

import pairs
import pytest
from batch_runs import ALGORITHMS as ALL
from batch_runs import LEFT_OUT, VARIANTS, compare
from distributed import run_ranks
from megatron_version import VERSION
from model_cases import has
from pipeline_runs import compare as compare_pipelines
from trainer_runs import IMPORTED

from mindspeed_cp.patches.versions import DEFAULT

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
# Others than the default version are asked what they pass, which does not depend on how variants exchange.
ALGORITHMS = [name for name in ALL if pairs.whole() or VERSION == DEFAULT or name not in VARIANTS]
CASES = (
    "mask of the dataloader, general",
    "mask of the dataloader, full",
    "mask of the dataloader, causal",
    "end-of-document tokens",
    "position ids",
    "by hand",
    "prefetch",
    "prefetch, recomputed",
    "packed elsewhere",
    "packed elsewhere, recomputed",
    "evaluation",
)
EXACT = [
    pytest.param(algorithm, case, id=f"{case}-{algorithm}")
    for case in CASES
    for algorithm in ALGORITHMS
    if pairs.whole() or algorithm not in VARIANTS or case not in LEFT_OUT
]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(4, compare, ALGORITHMS, pairs.whole(), timeout=400, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize(("algorithm", "case"), EXACT)
def test_every_batch_gives_what_it_gives_without_context_parallelism(ranks, algorithm, case):
    differences = [rank[algorithm][case] for rank in ranks]
    assert all(difference < 1e-5 for difference in differences), differences


@pytest.mark.skipif(not has("megatron.core.ssm.mamba_context_parallel"), reason="Mamba without context parallelism")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_state_space_layers_see_the_sequence_in_order_in_every_layout(ranks, algorithm):
    for rank in ranks:
        states, features, documents, said = rank[algorithm]["state-space layers"]
        assert states == features == documents == 0
        assert "one packed document of the layout document_zigzag" in said


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_documents_given_by_hand_are_not_lost_with_the_tensors_of_their_batch(ranks, algorithm):
    for rank in ranks:
        said = rank[algorithm]["by hand, lost"]
        assert "documents were given by hand" in said and "state().running(record)" in said


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_generation_is_refused_by_name(ranks, algorithm):
    for rank in ranks:
        assert "StaticInferenceContext" in rank[algorithm]["inference"]


@pytest.fixture(scope="module")
def pipelines():
    return run_ranks(4, compare_pipelines, timeout=400, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize("schedule", ["one after the other", "interleaved"])
@pytest.mark.parametrize(
    "name",
    [
        "ring",
        "ulysses",
        "ring, by hand",
        "ulysses, by hand",
        "ring, slices",
        "odd length",
        "multimodal positions",
        "packed and balanced",
    ],
)
def test_every_stage_of_a_pipeline_uses_the_documents_and_lengths_of_its_own_micro_batch(pipelines, name, schedule):
    differences = [rank[f"{name}, {schedule}"] for rank, _ in pipelines]
    assert all(difference < 1e-5 for difference in differences), differences


@pytest.mark.parametrize("schedule", ["one after the other", "interleaved"])
@pytest.mark.parametrize("name", ["ring", "ulysses", "packed and balanced"])
def test_a_pipeline_that_keeps_attention_sends_as_if_nothing_were_recomputed(pipelines, name, schedule):
    for _, sent in pipelines:
        without, recomputed, kept = sent[f"{name}, {schedule}"]
        assert without == kept < recomputed
