"""Dynamic context parallelism: micro-batches whose sizes Megatron chooses train as without context parallelism."""

import pytest
from distributed import run_ranks
from dynamic_runs import CASES, UNEVEN, compare
from model_cases import MODEL, has
from trainer_runs import IMPORTED

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.cpu_only,
    pytest.mark.skipif(not has("megatron.core.datasets.data_schedule"), reason="it comes with Megatron 0.16"),
]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(4, compare, timeout=400, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_of_every_size_train_as_without_context_parallelism(ranks, case):
    for rank in ranks:
        loss, gradients, sizes, *_ = rank[case]
        assert sizes == ([1, 2] if "tensor" in case else [1, 2, 4])
        assert loss < 2e-6 and gradients < 2e-6


def test_the_log_compares_all_ranks_that_share_the_micro_batches(ranks):
    figures, areas = [rank["ring"][3] for rank in ranks], [rank["ring"][4] for rank in ranks]
    pairs = sum(length * (length + 1) // 2 for length in UNEVEN) * len(ranks)  # a row of them for each rank
    assert sum(areas) == pairs * MODEL["num_layers"] * MODEL["num_attention_heads"]
    assert figures == figures[:1] * 4 and figures[0].num_steps == 1
    assert figures[0].areas.ratio == max(areas) * 4 / sum(areas) and figures[0].areas.least == areas.index(min(areas))
    assert figures[0].bytes["kv"] > 0 and figures[0].bytes["dkv"] > 0
    assert all(rank[case][3] is None for rank in ranks for case in CASES if case != "ring")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pipeline", "--pipeline-model-parallel-size"),
        ("loss", "--calculate-per-token-loss"),
        ("no size", "PackedSeqParams with local_cp_size"),
        ("not split", "local_cp_size 2 and was split over nothing known"),
    ],
)
def test_what_dynamic_context_parallelism_cannot_do_is_refused_by_name(ranks, name, says):
    for rank in ranks:
        assert says in rank["refused"][name] and "leave out --hybrid-context-parallel" in rank["refused"][name]


def test_rank_0_announces_the_largest_size(ranks):
    said = [rank["refused"]["said"] for rank in ranks]
    assert "Context parallelism: Ring, cp=4," in said[0] and said[0].count("Context parallelism:") == 1
    assert not any("Context parallelism:" in text for text in said[1:])
