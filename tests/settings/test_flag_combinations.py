"""The combinations of flags that launch scripts written for MindSpeed carry: each parses, resolves and trains as cp=1.

The table counts what MindSpeed-LLM's scripts use most; the flags stand as they stand there.
"""

import pairs
import pytest
from megatron_version import VERSION
from trainer_runs import largest_difference, prepare_data, run_training

from mindspeed_cp.patches.versions import DEFAULT

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]

RESET = "--reset-attention-mask"
POSITIONS = f"{RESET} --reset-position-ids"
GQA = "--group-query-attention --num-query-groups 2"
RING = "--context-parallel-algo megatron_cp_algo"
ULYSSES = "--context-parallel-algo ulysses_cp_algo"
OVERLAP = "--use-cp-send-recv-overlap --use-fused-ring-attention-update"
# name -> (flags of the data and the model, flags of context parallelism)
COMBINATIONS = {
    "ring, overlap, fused update": ("", f"{RING} {OVERLAP}"),
    "ulysses, reset, general, fixed": (
        RESET,
        f"{ULYSSES} --attention-mask-type general --fix-sub-seq-length 32",
    ),
    "ulysses, reset": (RESET, ULYSSES),
    "ring, reset, general": (RESET, f"{RING} --attention-mask-type general {OVERLAP}"),
    "kv all-gather, reset, positions, causal, overlap": (
        POSITIONS,
        f"--context-parallel-algo kvallgather_cp_algo --attention-mask-type causal {OVERLAP}",
    ),
    "hybrid, degree": ("", "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"),
    "ulysses, kv heads repeated": (GQA, f"{ULYSSES} --kv-head-repeat-before-uly-alltoall"),
    "ring, window": ("", f"{RING} --cp-window-size 2 --use-cp-send-recv-overlap --megatron-cp-in-bnsd"),
    "ring, mask on cpu": ("", f"{RING} --attention-mask-on-cpu --adaptive-cp-only-reschedule"),
}
if VERSION != DEFAULT and not pairs.whole():
    # What the flags choose is this project's own work, whatever Megatron it runs in: one of each kind of data and mask.
    chosen = "ring, overlap, fused update", "ulysses, reset", "ring, reset, general"
    COMBINATIONS = {name: COMBINATIONS[name] for name in chosen}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every combination on four ranks, and every kind of data and model without context parallelism."""
    prefix = prepare_data(tmp_path_factory.mktemp("data"), "paragraphs")
    common = "--train-iters 2 --seq-length 128 --position-embedding-type rope --eod-mask-loss"
    cases = {flags: f"{common} {flags}" for flags, _ in COMBINATIONS.values()}
    for name, (flags, ours) in COMBINATIONS.items():
        cases[name] = f"{common} {flags} --context-parallel-size 4 {ours}"
    return run_training(4, prefix, cases)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_flags_of_a_launch_script_train_to_the_losses_without_context_parallelism(runs, name):
    assert largest_difference(runs[name], runs[COMBINATIONS[name][0]]) < 1e-5


def test_documents_make_a_difference(runs):
    assert largest_difference(runs[RESET], runs[""]) > 1e-3
