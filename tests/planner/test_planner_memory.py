"""What the planner says that a layer keeps for its backward pass is what real ranks keep."""

import pairs
import pytest
import torch
from cases import DTYPES, Case
from distributed import run_ranks
from kept_bytes import expected_bytes
from measured import let_go, prepared, saved_bytes
from setups import SOME_SIZES, drawn, variants
from torch.utils.checkpoint import checkpoint

from mindspeed_cp import ContextParallelConfig, KeptAttention
from mindspeed_cp.planner import memory
from mindspeed_cp.planner.stages import RECOMPUTES
from mindspeed_cp.planner.trace import Notes, NotingKernel, Problem
from mindspeed_cp.settings.algorithms import ALGORITHMS

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::mindspeed_cp.settings.notices.ContextParallelWarning"),
]
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


def test_predicted_memory_is_the_memory_that_ranks_keep():
    for name, setting in SETTINGS.items():
        config = {"context_parallel_size": 4, **setting}
        case = Case(config, seq_len=64, batch=2, heads=8, kv_heads=2, dk=16, dv=8, dtype="float32")
        problem = Problem(64, 8, 2, 16, 8, batch=2, dtype=torch.float32)
        checked = ContextParallelConfig(**config)
        predicted = [memory.attention_bytes(checked, problem, rank, order="heads").saved for rank in range(4)]
        assert run_ranks(4, saved_bytes, case) == predicted, name


MASKS = {
    "causal": {},
    "full": {"mask_type": "full"},
    "packed": {"cu_seqlens": (0, 11, 13, 40, 48)},
    "rows packed differently": {"cu_seqlens": ((0, 11, 13, 40, 48), (0, 30, 48))},
    "window": {"window": (5, 0)},
}
LAYOUTS = ("auto", "balanced")
LAYERS = 3
WARM_UP = 4  # runs until no reused buffer grows any more


def problem_of(case):
    sizes = case.heads, case.kv_heads, case.dk, case.dv, case.batch
    return Problem(case.seq_len, *sizes, DTYPES[case.dtype], case.cu_seqlens, case.window)


def predicted(case):
    """AttentionBytes of every rank."""
    config, problem, order = ContextParallelConfig(**case.config), problem_of(case), case.kernel.order
    return [memory.attention_bytes(config, problem, rank, order, "gloo") for rank in range(case.cp)]


def peak_of_layers(rank, case, recompute="none", layers=1):
    """(most bytes alive in forward and backward of layers that make their query, key and value, reused buffers)."""
    call, leaves, _, groups = prepared(rank, case)

    def layer(kept, *tensors):
        return memory.layer(call, *tensors, kept=kept)

    def once():
        if recompute == "none":
            return layer(None, *leaves)
        if recompute == "full":
            return checkpoint(layer, None, *leaves, use_reentrant=True)  # as Megatron's own
        kept = KeptAttention()
        return checkpoint(layer, kept, *leaves, use_reentrant=False, early_stop=False, context_fn=kept.contexts)

    def run():
        ends = [once() for _ in range(layers)]
        while ends:
            end = ends.pop()
            end.backward(end)

    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
    for _ in range(WARM_UP):
        run()
    before = groups.workspace.num_bytes
    with let_go(), memory.LiveBytes() as live:
        run()
    assert groups.workspace.num_bytes == before
    return live.peak, before


def peaks_of_layers(rank, cases, *more):
    return [peak_of_layers(rank, case, *more) for case in cases]


def cases_of(algorithm, cp):
    """Of all that the engine makes: the kernel is the planner's, which makes its results and nothing else."""
    features = tuple(MASKS), LAYOUTS, (None, "half", "full"), (1, 2, 8), ("float32", "bfloat16"), (False, True)
    features += (None, "heads", "sequence"), (1, 2)
    for setup, mask, layout, policy, kv_heads, dtype, overlap, order, steps in drawn(algorithm, cp, *features):
        options = dict(MASKS[mask])
        config = {
            **setup,
            "kv_cache_policy": policy,
            "attention_mask_type": options.pop("mask_type", "causal"),
            "batch_layout": layout if mask == "packed" else "auto",
            "send_recv_overlap": overlap and algorithm != "ulysses_cp_algo",
            "in_flight": steps if setup["kv_exchange"] in ("direct", "mesh") else 1,
        }
        sizes = dict(seq_len=48, batch=2, heads=8, kv_heads=kv_heads, dk=6, dv=4, dtype=dtype)
        yield Case(config, **sizes, kernel=NotingKernel(Notes(), order), share_from=None, **options)


@pytest.mark.parametrize("algorithm, cp", [param for param in SOME_SIZES if param.values[1] > 1])
def test_predicted_peaks_are_those_of_live_tensors(algorithm, cp):
    cases = list(cases_of(algorithm, cp))
    cases = cases if cp < 8 or pairs.whole() else cases[::2]  # eight ranks take a third of the time
    for case, measured in zip(cases, zip(*run_ranks(cp, peaks_of_layers, cases))):
        assert measured == tuple((one.saved + one.passing, one.buffers) for one in predicted(case)), case


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_the_peak_of_many_layers_is_what_is_left_of_each_and_one_that_runs(recompute):
    for algorithm in ALGORITHMS:
        case = next(cases_of(algorithm, 4))
        measured = run_ranks(4, peak_of_layers, case, recompute, LAYERS)
        config, problem = ContextParallelConfig(**case.config), problem_of(case)
        for rank, (one, (peak, _)) in enumerate(zip(predicted(case), measured)):
            kept = memory.kept_bytes(config, problem, rank, case.kernel.order)
            left = {"none": one.saved, "full": 0, "full, attention kept": kept}[recompute]
            assert peak == (LAYERS - 1) * left + one.saved + one.passing, (case, rank)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_predicted_bytes_of_kept_attention_are_the_formulas(algorithm):
    for config in variants(algorithm, 4):
        case = Case(config, seq_len=32, batch=2, heads=8, kv_heads=4, dk=6, dv=4, dtype="bfloat16")
        for order in ("heads", None):  # with instructions for bfloat16 and without them
            kept = memory.kept_bytes(ContextParallelConfig(**config), problem_of(case), 0, order=order)
            assert 2 * kept == expected_bytes(case, order, 0), (case, order)
