"""BERT, T5 and functions outside of any model equal those without context parallelism, or are refused by name."""

import pytest
from distributed import run_ranks
from megatron_version import MINOR
from other_models import ALGORITHMS, CASES, compare
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
REFUSED = {
    "BERT with a binary head": ["Pooler with --context-parallel-size 2", "--bert-no-binary-head", "--cp-trust Pooler"],
    "T5 of two lengths": [f"{24} and {16} tokens", "an encoder and a decoder of one length"],
    "LLaVA": ["LLaVAModel with --context-parallel-size 2", "state().shard_batch"],
}
if (0, 16) <= MINOR < (0, 19):
    REFUSED["sparse attention"] = ["DSAttention with --context-parallel-size 2", "without a sparse indexer"]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, compare, timeout=200, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize(("model", "positions"), CASES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_models_that_make_their_own_positions_equal_those_without_context_parallelism(
    ranks, algorithm, model, positions
):
    for rank in ranks:
        assert rank[algorithm, model, positions] < 2e-6


@pytest.mark.skipif(MINOR < (0, 16), reason="packed sequences of multi-token prediction come with 0.16")
def test_packed_documents_without_a_record_are_rolled_as_megatron_splits_them(ranks):
    first, second = (rank["rolled"] for rank in ranks)
    assert first[0] == [2, 3, 8, 0, 12, 13, 14, 21, 22, 0]
    assert second[0] == [4, 5, 6, 7, 15, 16, 17, 18, 19, 20]
    assert first[1] == second[1] == (sum(first[0]) + sum(second[0])) / 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name_with_the_way_out(ranks, name):
    for rank in ranks:
        said = rank["refusals"][name]
        assert [part for part in REFUSED[name] if part not in said] == [], said


def test_modules_of_users_are_named_once_and_refused_ones_are_met_when_they_are_added_later(ranks):
    said, refusal = ranks[0]["added later"]
    assert len(said) == 1 and "BertModel: Gate." in said[0]
    assert "Pooler with --context-parallel-size 2" in refusal
    assert [rank["trusted"] for rank in ranks] == ["", ""]
