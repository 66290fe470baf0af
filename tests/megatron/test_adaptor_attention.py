"""From Megatron's core attention to ours on two ranks: the same numbers as Megatron's own, and what is refused."""

import re

import pytest
from bridge_parts import ALGORITHMS, DOCUMENTS, SEQ, cases
from bridge_runs import calculate_from_core_attention, compare
from distributed import run_ranks
from megatron_version import VERSION
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
OLD = VERSION.startswith("0.12")
DENSE = {"neither"}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, compare, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", [*cases(OLD), "packed", "wrapped"])
def test_two_ranks_give_what_megatron_gives_alone(ranks, algorithm, name):
    differences = [rank["differences"][f"{algorithm} {name}"] for rank in ranks]
    assert all(difference < 1e-5 for difference in differences), differences


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_a_mask_that_no_interval_describes_stays_dense(ranks, algorithm):
    for rank in ranks:
        assert {name for name in cases(OLD) if rank["dense"][f"{algorithm} {name}"]} == DENSE


def test_dense_masks_are_recognised(ranks):
    assert ranks[0]["examined"] == {
        "causal": ((0, SEQ),),
        "documents": (DOCUMENTS,),
        "documents by row": (DOCUMENTS, (0, 9, SEQ)),
        "neither": None,
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_recomputation_sees_the_batch_of_its_forward_pass(ranks, algorithm):
    assert [rank[f"recompute {algorithm}"] for rank in ranks] == [0, 0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_kept_attention_gives_the_gradients_of_its_recomputation_and_sends_nothing_twice(ranks, algorithm):
    for rank in ranks:
        found = rank[f"kept {algorithm}"]
        assert [difference for difference, _ in found.values()] == [0, 0, 0, 0]
        assert [tuple(bool(sent) for sent in calls) for _, calls in found.values()] == [
            (True, False),
            (True, True, False, False),
            (True, False, False),
            (True,),
        ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bias", ["attention_bias is not supported", "leave it out", "--context-parallel-size 1"]),
        ("format", ["qkv_format sbhd", "use qkv_format thd", "leave them out"]),
        ("hybrid", ["local_cp_size 1", "leave out --hybrid-context-parallel"]),
        ("hybrid sbhd", ["local_cp_size 4", "leave out --hybrid-context-parallel"]),
        ("split mask", ["attention_mask has shape (2, 1, 12, 24)", "(batch, 1, 24, 24)", "do not split it"]),
        (
            "short mask",
            ["attention_mask has shape (2, 1, 12, 12)", "(batch, 1, 24, 24)", "do not split it over the ranks"],
        ),
        (
            "short mask, no batch",
            ["attention_mask has shape (2, 1, 12, 12)", "(batch, 1, S, S)", "do not split it over the ranks"],
        ),
        ("length", ["holds 11 tokens", "a sequence of 24 gives it 12", "split every batch with"]),
    ],
)
def test_attention_refuses_what_it_would_compute_wrongly(ranks, name, says):
    for rank in ranks:
        assert [part for part in says if part not in rank["refused"][name]] == []


def test_rank_0_says_once_what_is_on(ranks):
    num_patches = ranks[0]["num_patches"] - ranks[0]["stand_in"]
    line = f"Context parallelism: Ring, cp=2, zigzag, causal, kernel cpu, {num_patches} patches\n"
    assert ranks[0]["announced megatron_cp_algo"] == line and num_patches > 10
    assert re.match("Context parallelism: Ulysses, cp=2, contiguous, causal,", ranks[0]["announced ulysses_cp_algo"])
    assert [value for name, value in ranks[1].items() if name.startswith("announced")] == ["", "", ""]
    assert ", kernel cpu (float16 in float32), " in ranks[0]["said of float16"]


def test_another_size_than_the_configured_one_is_refused_before_any_process_group(ranks):
    for message, has_groups in (rank["wrong size"] for rank in ranks):
        assert "--context-parallel-size 2 was configured" in message and "context_parallel_size=1" in message
        assert "pass the same size to both" in message and not has_groups


def test_a_calculator_of_ones_own_gets_every_argument_of_the_attention_call():
    for rank, (args, kwargs, tokens) in enumerate(
        run_ranks(2, calculate_from_core_attention, fresh=True, imported=IMPORTED)
    ):
        assert args == (None,)
        assert kwargs == {
            "attn_mask_type": None,
            "attention_bias": None,
            "packed_seq_params": None,
            "gather_size": SEQ - 1,
        }
        assert tokens == [12, 11][rank]
