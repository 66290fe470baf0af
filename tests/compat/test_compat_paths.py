"""MindSpeed's import paths: what they give, when they are there, and that nothing of them stays."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from alone import run_script
from distributed import run_ranks

from mindspeed_cp import compat
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.compat import process_groups
from mindspeed_cp.compat.group_getters import GroupGetters
from mindspeed_cp.settings.config import ContextParallelConfig

CP = "mindspeed.core.context_parallel"
NAMES = {
    f"{CP}.ulysses_context_parallel": [
        "UlyssesContextAttention",
        "GatherSizeCalculator",
        "DefaultGatherSizeCalculator",
        "DynamicGatherSizeCalculator",
    ],
    f"{CP}.ulysses_context_parallel.ulysses_context_parallel": [
        "UlyssesContextAttention",
        "DynamicGatherSizeCalculator",
        "ulyssesattn_context_parallel",
    ],
    f"{CP}.ulysses_context_parallel.unaligned_cp.mapping": [
        "all_to_all",
        "cal_split_sizes",
        "split_forward_gather_backward",
        "gather_forward_split_backward",
    ],
    f"{CP}.ring_context_parallel.ring_context_parallel": ["ringattn_context_parallel"],
    f"{CP}.model_parallel_utils": process_groups.__all__,
    "mindspeed.core.parallel_state": process_groups.__all__,
    f"{CP}.ring_context_parallel.context_parallel_kv_cache": ["get_cache_policy"],
    f"{CP}.get_batch_utils": ["set_actual_seq_len", "get_actual_seq_len"],
    f"{CP}.utils": ["sbh_to_tnd", "tnd_to_sbh"],
    "mindspeed.utils": ["set_position_ids", "get_position_ids", "set_actual_seq_len", "get_actual_seq_len"],
    "mindspeed.patch_utils": ["MindSpeedPatchesManager"],
    "mindspeed.arguments": ["process_args"],
    # Older generations of MindSpeed have these a package higher.
    f"{CP}.context_parallel_kv_cache": ["get_cache_policy"],
    f"{CP}.unaligned_cp.mapping": ["all_to_all", "cal_split_sizes"],
    f"{CP}.mapping": ["all_to_all", "split_forward_gather_backward", "gather_forward_split_backward"],
}


@pytest.fixture
def installed():
    before = set(sys.modules), list(sys.meta_path)
    assert compat.install() == ""
    yield
    compat.uninstall()
    assert list(sys.meta_path) == before[1]
    assert not [name for name in sys.modules if name.split(".")[0] == "mindspeed" and name not in before[0]]


@pytest.mark.parametrize("name", NAMES)
def test_every_documented_path_gives_our_own_objects(installed, name):
    module = importlib.import_module(name)
    ours = importlib.import_module(compat.ALIASES[name])
    for attribute in NAMES[name]:
        assert getattr(module, attribute) is getattr(ours, attribute)
    assert ours.__name__.startswith("mindspeed_cp.") and ours.__spec__.name == ours.__name__
    assert module.__name__ == name and module.__all__ == ours.__all__


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (
            "from mindspeed.core.parallel_state import get_tp_x_ring_global_ranks",
            ["'get_tp_x_ring_global_ranks'", "mindspeed.core.parallel_state", "get_ring_group_for_intra_window"],
        ),
        (
            f"from {CP}.ring_context_parallel.context_parallel_kv_cache import ContextParallelKVCache",
            ["get_cache_policy", "kv_cache_policy of ContextParallelConfig"],
        ),
        (
            f"from {CP}.get_batch_utils import get_batch_on_this_cp_rank",
            ["megatron.core.utils.get_batch_on_this_cp_rank"],
        ),
        (f"import {CP}.adaptive_context_parallel.adaptive_context_parallel", ["--cp-kv-exchange direct"]),
        (f"from {CP} import adaptor", ["'adaptor'", "ring_context_parallel, ", "ulysses_context_parallel"]),
        ("from mindspeed.utils import print_rank_0", ["'print_rank_0'", "set_actual_seq_len", "leave it out"]),
        (f"import {CP}.anything", ["'anything'"]),
    ],
)
def test_a_name_that_only_mindspeed_has_is_an_import_error_that_says_what_is_here(installed, statement, says):
    with pytest.raises(ImportError) as error:
        exec(statement, {})
    says = [*says, "mindspeed_cp answers", "docs/migration-from-mindspeed.md"]
    assert [part for part in says if part not in str(error.value)] == []


def test_asking_whether_a_name_is_there_has_an_answer(installed):
    module = importlib.import_module("mindspeed.core.parallel_state")
    assert hasattr(module, "get_ring_group_for_intra_window") and not hasattr(module, "get_tp_x_ring_global_ranks")


@pytest.mark.parametrize("interval", [0, 1, 2, 5])
@pytest.mark.parametrize("policy", [None, "half", "full"])
def test_the_cache_policy_of_a_layer_is_that_of_the_configuration(installed, policy, interval):
    from mindspeed.core.context_parallel.ring_context_parallel.context_parallel_kv_cache import get_cache_policy

    config = ContextParallelConfig(
        context_parallel_size=2,
        algorithm="megatron_cp_algo",
        kv_cache_policy=policy,
        kv_cache_interval=interval if policy else 0,
    )
    assert [get_cache_policy(layer, policy, interval) for layer in range(1, 13)] == [
        config.kv_cache_policy_for(layer) for layer in range(1, 13)
    ]


def test_unknown_paths_are_not_found(installed):
    with pytest.raises(ModuleNotFoundError, match="mindspeed.core.memory"):
        importlib.import_module("mindspeed.core.memory")


def test_install_twice_and_uninstall_twice_change_nothing_more(installed):
    assert compat.install() != ""
    assert sum(isinstance(finder, compat.MindSpeedFinder) for finder in sys.meta_path) == 1
    compat.uninstall()
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mindspeed")
    assert compat.install() == ""


def test_a_real_mindspeed_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed" / "__init__.py").write_text("REAL = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = list(sys.meta_path)
    assert "installed" in compat.install()
    assert list(sys.meta_path) == before
    try:
        assert importlib.import_module("mindspeed").REAL
    finally:
        sys.modules.pop("mindspeed", None)


def _getters(rank, monkeypatched):
    """(hierarchy keywords, expected answers by getter) for each case, on every rank."""
    for settings, expected in monkeypatched:
        groups = ContextParallelGroups.build(ContextParallelConfig(context_parallel_size=4, **settings))
        getters = GroupGetters(lambda groups=groups: SimpleNamespace(groups=groups))
        try:
            for name, answers in expected.items():
                answer = getattr(getters, name)()
                if isinstance(answer, torch.distributed.ProcessGroup):
                    answer = torch.distributed.get_process_group_ranks(answer)
                assert answer == answers[rank], f"{name} on rank {rank} of {settings}: {answer}"
            if groups.ring_size == 1:
                assert getters.get_context_parallel_group_for_send_recv_overlap(check_initialized=False) is None
                with pytest.raises(ValueError, match="choose an algorithm"):
                    getters.get_context_parallel_group_for_hybrid_ring()
        finally:
            groups.destroy()


def test_group_getters_name_the_ranks_that_mindspeed_names():
    hybrid = {
        "get_context_parallel_for_hybrid_ulysses_world_size": [2] * 4,
        "get_context_parallel_for_hybrid_ulysses_rank": [0, 1, 0, 1],
        "get_context_parallel_group_for_hybrid_ulysses": [[0, 1], [0, 1], [2, 3], [2, 3]],
        "get_context_parallel_group_for_hybrid_ring": [[0, 2], [1, 3], [0, 2], [1, 3]],
        "get_context_parallel_for_hybrid_ring_rank": [0, 0, 1, 1],
        "get_context_parallel_for_hybrid_ring_world_size": [2] * 4,
        "get_context_parallel_for_hybrid_ring_global_ranks": [[0, 2], [1, 3], [0, 2], [1, 3]],
    }
    double = {
        "get_ring_ranks_for_intra_window": [[0, 1], [0, 1], [2, 3], [2, 3]],
        "get_ring_ranks_for_inter_window_kv": [[0, 2], [1, 3], [0, 2], [1, 3]],
        "get_ring_ranks_for_inter_window_dkv": [[0, 3], [1, 2], [1, 2], [0, 3]],
        "get_ring_group_for_intra_window": [[0, 1, 2, 3]] * 4,
        "get_context_parallel_group_for_send_recv_overlap": [[0, 1, 2, 3]] * 4,
    }
    single = {
        "get_ring_ranks_for_intra_window": [[0], [1], [2], [3]],
        "get_ring_ranks_for_inter_window_kv": [[0, 1, 2, 3]] * 4,
        "get_ring_ranks_for_inter_window_dkv": [[0, 1, 2, 3]] * 4,
    }
    run_ranks(
        4,
        _getters,
        [
            ({"algorithm": "hybrid_cp_algo", "ulysses_degree": 2}, hybrid),
            ({"algorithm": "megatron_cp_algo", "window_size": 2}, double),
            ({"algorithm": "megatron_cp_algo"}, single),
            ({"algorithm": "ulysses_cp_algo"}, {}),
        ],
    )


# The published sample code, as it is, for both import paths.
SAMPLE = """
# 示例代码
import megatron.core.parallel_state as ps
from {path} import UlyssesContextAttention, GatherSizeCalculator, DynamicGatherSizeCalculator
from your_library import FlashSelfAttention

# 自定义 GatherSizeCalculator
class CustomGatherSizeCalculator(GatherSizeCalculator):
    def calculate(self, *args, **kwargs):
        # 示例逻辑
        return kwargs.get("gather_size", None)


core_attention = FlashSelfAttention()
# 根据实际情况，使用预定义DynamicGatherSizeCalculator()或自定义CustomGatherSizeCalculator()
calculator = DynamicGatherSizeCalculator()
ulysses_attention = UlyssesContextAttention(core_attention, ps.get_context_parallel_group(),
                                            gather_size_calculator=calculator)
"""

# What a user's script does around it: MindSpeed's way of importing the adaptor, and one forward pass of an odd length.
BEFORE = """
import sys, torch, torch.distributed as dist
import mindspeed_cp.megatron_adaptor
from mindspeed import megatron_adaptor
import mindspeed.megatron_adaptor
assert megatron_adaptor is mindspeed.megatron_adaptor is sys.modules["mindspeed_cp.megatron_adaptor"]
from megatron.core import parallel_state
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(context_parallel_size=2)
"""
AFTER = """
from mindspeed.core.context_parallel.ulysses_context_parallel.unaligned_cp.mapping import cal_split_sizes
from mindspeed.core.parallel_state import get_context_parallel_next_rank, get_context_parallel_prev_rank
rank, seq = dist.get_rank(), 7
assert get_context_parallel_next_rank() == get_context_parallel_prev_rank() == 1 - rank
query = torch.randn(seq, 1, 4, 2, generator=torch.Generator().manual_seed(1)).split(cal_split_sizes(seq, 2))[rank]
mask = torch.zeros(1, 1, seq, seq, dtype=torch.bool)
out = ulysses_attention(query, query, query, mask)
assert torch.equal(out, query.flatten(2)) and core_attention.lengths == [seq]
custom = UlyssesContextAttention(core_attention, ps.get_context_parallel_group(),
                                 gather_size_calculator=CustomGatherSizeCalculator())
assert torch.equal(custom(query, query, query, mask, gather_size=seq), query.flatten(2))
assert torch.equal(ulysses_attention(query, query, query, None), query.flatten(2))
print(f"done {rank}\\n", end="", flush=True)  # one write: two ranks share the pipe
"""
YOUR_LIBRARY = """
import torch

class FlashSelfAttention(torch.nn.Module):
    lengths = []

    def forward(self, query, key, value, attention_mask):
        self.lengths.append(len(query)) if not self.lengths else None
        return query.flatten(2)
"""


@pytest.mark.parametrize(
    "path",
    [
        "mindspeed.core.context_parallel.ulysses_context_parallel.ulysses_context_parallel",
        "mindspeed.core.context_parallel.ulysses_context_parallel",
    ],
)
def test_a_script_written_for_mindspeed_runs_with_the_published_sample_code(tmp_path, path):
    (tmp_path / "your_library.py").write_text(YOUR_LIBRARY)
    script = tmp_path / "train.py"
    script.write_text(BEFORE + SAMPLE.format(path=path) + AFTER)
    printed = run_script(script, 2, MINDSPEED_CP_DEVICE="cpu")
    assert "done 0" in printed and "done 1" in printed
