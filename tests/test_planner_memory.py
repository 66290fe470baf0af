"""What the planner says that a layer keeps for its backward pass is what real ranks keep."""

import pytest
import torch
from cases import Case
from distributed import run_ranks
from test_memory import saved_bytes

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.planner import memory
from mindspeed_cp.planner.trace import Problem

pytestmark = pytest.mark.cpu_only
SETTINGS = {
    "ulysses": {},
    "ulysses-half": {"kv_cache_policy": "half"},
    "ulysses-full": {"kv_cache_policy": "full"},
    "ring": {"algorithm": "megatron_cp_algo"},
    "ring-full": {"algorithm": "megatron_cp_algo", "kv_cache_policy": "full"},
    "double-ring": {"algorithm": "megatron_cp_algo", "window_size": 2},
    "hybrid": {"algorithm": "hybrid_cp_algo", "ulysses_degree": 2},
    "all-gather": {"algorithm": "kvallgather_cp_algo"},
}


@pytest.mark.filterwarnings("ignore::mindspeed_cp.notices.ContextParallelWarning")
def test_predicted_memory_is_the_memory_that_ranks_keep():
    for name, setting in SETTINGS.items():
        config = {"context_parallel_size": 4, **setting}
        case = Case(config, seq_len=64, batch=2, heads=8, kv_heads=2, dk=16, dv=8, dtype="float32")
        problem = Problem(64, 8, 2, 16, 8, batch=2, dtype=torch.float32)
        checked = ContextParallelConfig(**config)
        predicted = [memory.saved_bytes(checked, problem, rank, order="heads") for rank in range(4)]
        assert run_ranks(4, saved_bytes, case) == predicted, name
