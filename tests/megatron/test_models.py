"""Whole models with what modern ones are made of: loss, gradients and updates equal those without context
parallelism.
"""

import pairs
import pytest
from distributed import RankFailure, run_ranks
from megatron_version import VERSION
from model_cases import BY_LENGTH, HYBRID, IN_BF16, REMARKABLE, RING, ULYSSES, cases
from model_runs import compare
from trainer_runs import IMPORTED

from mindspeed_cp.patches.versions import DEFAULT

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]

EVERY, DYNAMIC = tuple(cases()), {"gather_size_calculator": "dynamic"}
ALL = tuple(name for name in EVERY if name != BY_LENGTH)  # whose row is over four ranks
SOME = tuple(
    name
    for name in ALL
    if name
    in (
        "multi-token prediction",
        "multi-latent attention, packed",
        "all of them",
        "experts, auxiliary losses without padding",
        "learnable softmax",
    )
)
# Two ranks take every case, three and four half of some for each run; with --full all of those.
FIRST, SECOND = (SOME, SOME) if pairs.whole() else (SOME[::2], SOME[1::2])
# A case shows how a part of a model takes a split sequence, contiguous (Ulysses) or zigzag (ring): on two ranks one of
# the two takes it, and both only parts that move tokens or read their places themselves. On other versions than the
# default one, where Megatron's side is what is asked, no case is taken twice.
PLACES = (
    "multi-token prediction",
    "multi-token prediction, packed",
    "multi-latent attention",
    "multi-latent attention, packed",
    "all of them",
    "experts, auxiliary losses without padding",
    "learnable softmax",
    "gpt-oss, packed",
    "Gemma 3",
    "Qwen 2 VL, packed",
)
TWICE = tuple(name for name in ALL if pairs.whole() or (VERSION == DEFAULT and name in PLACES))
ONCE = tuple(name for name in ALL if name not in TWICE)
ON_ULYSSES, ON_RING = (*TWICE, *ONCE[::2]), (*TWICE, *ONCE[1::2])
# The balanced layout differs in the order of tokens, whatever angles they are turned by or experts they are sent to.
AS_ON_TWO = ("latent attention, packed, yarn", "multi-token prediction, three deep, packed", "Mixtral, packed")
PACKED = tuple(name for name in EVERY if "packed" in name and (pairs.whole() or name not in AS_ON_TWO))
# A balanced layout is the same over a ring and over a ring of Ulysses groups: each case takes one of them, and both get
# windows or experts, latent attention and multi-token prediction.
ON_BALANCED_HYBRID, ON_BALANCED_RING = (PACKED, PACKED) if pairs.whole() else (PACKED[::2], PACKED[1::2])
BALANCED = {"context_parallel_size": 4, "batch_layout": "balanced", "kv_exchange": "auto", "keep_attention": True}
# Two layers of two algorithms; layers of multi-token prediction come behind them.
LOCAL_AND_GLOBAL = {
    "context_parallel_size": 4,
    "algorithm": RING,
    "kv_exchange": "direct",
    "layer_algorithms": f"1-/2:{ULYSSES}",
}
EACH_ITS_OWN = {
    "context_parallel_size": 4,
    "algorithm": ULYSSES,
    "layer_algorithms": f"0:kvallgather_cp_algo,1:{HYBRID}:ulysses-degree-in-cp=2,3-:{RING}:cp-kv-exchange=mesh",
    "keep_attention": True,
}
WITH_WINDOWS = tuple(name for name in EVERY if name in ("gpt-oss", "Gemma 3")) or ("multi-token prediction",)
OF_THEIR_OWN = tuple(name for name in EVERY if name == "all of them, recomputed") or ("multi-latent attention",)
EXPERTS = tuple(name for name in ALL if name.startswith("experts, auxiliary") or name == "all of them")
SHARED = "ring cp=2, experts on both"
# Ranks -> (length, name of the run -> (settings, cases)). Lengths of two and three ranks are uneven, heads of three
# too.
RUNS = {
    2: (
        31,
        {
            "ulysses cp=2": ({"context_parallel_size": 2, "algorithm": ULYSSES, **DYNAMIC}, (*ON_ULYSSES, *IN_BF16)),
            "ring cp=2": ({"context_parallel_size": 2, "algorithm": RING}, (*ON_RING, *IN_BF16)),
            SHARED: (
                {"context_parallel_size": 2, "algorithm": RING, "expert_model_parallel_size": 2},
                (*EXPERTS, *REMARKABLE),
            ),
        },
    ),
    3: (
        37,
        {
            "ulysses cp=3": ({"context_parallel_size": 3, "algorithm": ULYSSES, **DYNAMIC}, FIRST),
            "ring cp=3": ({"context_parallel_size": 3, "algorithm": RING}, SECOND),
        },
    ),
    4: (
        32,
        {
            "ring cp=2, dp=2": ({"context_parallel_size": 2, "algorithm": RING}, FIRST),
            "ulysses cp=4": ({"context_parallel_size": 4, "algorithm": ULYSSES}, SECOND),
            "hybrid cp=4": ({"context_parallel_size": 4, "algorithm": HYBRID, "ulysses_degree": 2}, FIRST),
            "local layers direct, global ones Ulysses": (LOCAL_AND_GLOBAL, WITH_WINDOWS),
            "an algorithm for each layer": (EACH_ITS_OWN, OF_THEIR_OWN),
            "ring cp=4, balanced": ({**BALANCED, "algorithm": RING}, ON_BALANCED_RING),
            "hybrid cp=4, balanced": (
                {**BALANCED, "algorithm": HYBRID, "ulysses_degree": 2},
                ON_BALANCED_HYBRID,
            ),
        },
    ),
}
EXACT = [
    (count, name, case)
    for count, (_, parallel) in RUNS.items()
    for name, (_, chosen) in parallel.items()
    for case in chosen
    if case in EVERY
]


@pytest.fixture(scope="module")
def world():
    """count -> results of every rank; a world starts once, when a test first asks for it, also when it fails."""
    found = {}

    def results(count):
        if count not in found:
            try:
                found[count] = run_ranks(count, compare, *RUNS[count], timeout=400, fresh=True, imported=IMPORTED)
            except RankFailure as failure:
                found[count] = failure
        if isinstance(found[count], RankFailure):
            raise found[count]
        return found[count]

    return results


@pytest.mark.parametrize(("count", "name", "case"), EXACT)
def test_loss_and_gradients_equal_those_without_context_parallelism(world, count, name, case):
    for rank in world(count):
        loss, grad_norm, gradient, parameter = rank[name][case]
        assert loss < 1e-5 and grad_norm < 1e-5 and gradient < 2e-5, (loss, grad_norm, gradient, parameter)


@pytest.mark.parametrize("case", IN_BF16)
@pytest.mark.parametrize("name", ["ulysses cp=2", "ring cp=2"])
def test_bfloat16_is_as_near_to_float32_as_without_context_parallelism(world, name, case):
    for rank in world(2):
        (loss, gradient), (loss_alone, gradient_alone) = rank[name][case]
        assert 1e-5 < loss < 1.5 * loss_alone and 1e-4 < gradient < 1.5 * gradient_alone


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (
            "allgather",
            [
                "--moe-token-dispatcher-type allgather",
                "sequence length 31",
                "--context-parallel-size 2",
                "use --moe-token-dispatcher-type alltoall",
            ],
        ),
        ("capacity", ["--moe-expert-capacity-factor 1.0", "each context-parallel rank", "leave it out"]),
        ("sinkhorn", ["--moe-router-load-balancing-type sinkhorn", "each context-parallel rank", "use aux_loss"]),
    ],
)
def test_experts_whose_results_depend_on_the_ranks_are_refused_or_said(world, case, parts):
    ranks = world(2)
    said = ranks[0][SHARED][case]
    assert [part for part in parts if part not in said] == []
    assert "context-parallel" not in ranks[0][SHARED]["nothing remarkable"]


def test_a_dispatcher_that_needs_equal_lengths_is_refused_on_every_rank(world):
    first, second = (rank[SHARED]["allgather"] for rank in world(2))
    assert first == second != ""
