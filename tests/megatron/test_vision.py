"""The vision-language model of docs/vision-language.md, equal to one process: a tower alone on each rank, image tokens
embedded before or after the split or by a framework, multimodal positions, features added behind layers.
"""

import pytest
from distributed import run_ranks
from megatron_version import MINOR
from pairs import whole
from trainer_runs import IMPORTED
from vision_runs import compare

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.cpu_only,
    pytest.mark.skipif(MINOR < (0, 16), reason="towers of 0.12 need Transformer Engine, and packed batches 0.16"),
]
LENGTH = 41  # which no number of ranks divides
CASES = ("rows", "packed", "recomputed")
RING = {"algorithm": "megatron_cp_algo"}
# Ranks -> name of the run -> (settings, where image tokens are embedded).
RUNS = {
    2: {
        "ring": (RING | {"batch_layout": "zigzag"}, ("before", "a framework", "a framework, whole ids")),
        "ulysses": ({"algorithm": "ulysses_cp_algo"}, ("after",)),
    },
    4: {
        "hybrid": ({"algorithm": "hybrid_cp_algo", "ulysses_degree": 2}, ("before", "after")),
        "direct, balanced": (RING | {"batch_layout": "balanced", "kv_exchange": "direct"}, ("before", "after")),
    },
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.skipif(not whole(), reason="with --full"))])
def test_losses_and_gradients_equal_those_of_one_process_wherever_images_are_embedded(size):
    for rank in run_ranks(size, compare, size, LENGTH, RUNS[size], CASES, timeout=200, fresh=True, imported=IMPORTED):
        assert len(rank) == len(CASES) * (2 + sum(len(ways) for _, ways in RUNS[size].values()))
        assert all(value < 2e-6 for value in rank.values()), rank
