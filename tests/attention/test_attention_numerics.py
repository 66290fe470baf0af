"""Invariants 2 and 6: low precision is as good as one device's and flat in the size; results are the same every
time.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import Case, arguments, attend, expected, setup_of, whole
from distributed import run_ranks
from reference import attention_with_gradients
from setups import SOME_SIZES, degree_of, drawn, exchanges, shapes

from mindspeed_cp.settings.algorithms import ALGORITHMS

LOW = {"seq_len": 512, "heads": 8, "kv_heads": 8, "dk": 32, "dv": 32, "seed": 7}


@cache
def exact(dtype):
    """The dense result of the problem LOW, which all algorithms and sizes share."""
    return expected(Case({}, dtype=dtype, **LOW))


def relative_errors(config, dtype):
    """Dict name -> root mean square error against float64, over the root mean square of the exact value."""
    case = Case(config, dtype=dtype, **LOW)
    got, want = whole(case, run_ranks(case.cp, attend, case)), exact(dtype)
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


def low_precision_shapes(cp):
    for algorithm in ALGORITHMS:
        for shape in shapes(algorithm, cp):
            yield shape
            if ALGORITHMS[algorithm].exchange == "ring" and "window_size" not in shape:
                yield {**shape, "kv_exchange": "direct"}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def one_device(request):
    return request.param, relative_errors({"context_parallel_size": 1}, request.param)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_low_precision_errors_are_at_most_one_and_a_half_times_one_devices(one_device, cp):
    dtype, single = one_device
    for shape in low_precision_shapes(cp):
        errors = relative_errors(shape, dtype)
        assert all(errors[name] <= 1.5 * single[name] for name in single), (shape, errors, single)


@pytest.mark.parametrize("options", [{}, {"kv_exchange": "direct"}], ids=["ring", "direct"])
def test_low_precision_errors_of_a_ring_are_flat_in_its_size(options):
    errors = {
        cp: relative_errors({"context_parallel_size": cp, "algorithm": "megatron_cp_algo", **options}, "bfloat16")
        for cp in (2, 5, 8)
    }
    for name in errors[2]:
        assert errors[8][name] <= 1.25 * errors[2][name], (name, errors)
        assert errors[5][name] <= 1.25 * errors[2][name], (name, errors)


def attend_twice(rank, case):
    return attend(rank, case), attend(rank, case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cp", [2, 4])
def test_two_runs_are_bitwise_equal(cp, dtype):
    for shape in low_precision_shapes(cp):
        case = Case(shape, seq_len=45, heads=2 * degree_of(shape), kv_heads=1, dtype=dtype)
        cases = [case]
        if "direct" in exchanges(shape):
            packed = replace(case, seq_len=96, cu_seqlens=(0, 9, 60, 63, 96))
            cases.append(packed.with_config(batch_layout="balanced", kv_exchange="auto"))
        for case in cases:
            for first, second in run_ranks(cp, attend_twice, case):
                assert all(torch.equal(first[name], second[name]) for name in first), str(case)


def attend_among_poison(rank, case):
    """Like attend, with NaN around the inputs, in every reused buffer that is handed out, and in fresh memory."""
    from mindspeed_cp import context_parallel_attention
    from mindspeed_cp.comm.workspace import Workspace

    config, groups = setup_of(case.config)
    layout, tensors = case.layout(), case.inputs()
    handed_out = []

    def poisoned_get(self, name, shape, dtype, device, get=Workspace.get):
        buffer = get(self, name, shape, dtype, device)
        handed_out.append(name)
        return buffer.fill_(torch.nan)

    def poisoned_borrow(self, count, dtype, device, borrow=Workspace.borrow):
        return borrow(self, count, dtype, device).fill_(torch.nan)

    def padded(name):
        shard = layout.shard(tensors[name], rank)
        room = torch.full((shard.shape[0] + 3, *shard.shape[1:]), torch.nan, dtype=shard.dtype)
        room[: shard.shape[0]] = shard
        return room[: shard.shape[0]]

    leaves = [padded(name).requires_grad_() for name in ("query", "key", "value")]
    keywords = arguments(case, config, groups, layout, tensors["sinks"], tensors["attention_mask"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "get", poisoned_get)
        patch.setattr(Workspace, "borrow", poisoned_borrow)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
        try:
            assert torch.empty(3).isnan().all()
            out = context_parallel_attention(*leaves, **keywords)
            out.backward(padded("grad_out"))
        finally:
            torch.use_deterministic_algorithms(False)
    assert handed_out or case.cp == 1, "the poison was never used"
    return {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("qkv", leaves)}}


@pytest.mark.cpu_only
@pytest.mark.parametrize("algorithm, cp", SOME_SIZES)
def test_poisoned_padding_and_stale_memory_never_reach_a_result(algorithm, cp):
    options = ({}, {"cu_seqlens": (0, 2, 2, 9, 13)}, {"window": (2, 0)}, {"dense": "shared"})
    for setup, number, dtype in drawn(algorithm, cp, range(len(options)), ("float64", "bfloat16")):
        heads, kv_heads = 2 * degree_of(setup), degree_of(setup)
        case = Case(setup, seq_len=13, heads=heads, kv_heads=kv_heads, dtype=dtype, **options[number])
        got = whole(case, run_ranks(cp, attend_among_poison, case))
        clean = whole(case, run_ranks(cp, attend, case))
        assert all(torch.equal(got[name], clean[name]) for name in got), str(case)
        assert all(got[name].isfinite().all() for name in got), str(case)


def non_contiguous_inputs(rank, case):
    """Inputs cut out of one projection, as a model makes them, and an expanded gradient, as sum().backward() makes
    it.
    """
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config)
    layout, tensors = case.layout(), case.inputs()
    fused = torch.cat(
        [layout.shard(tensors[name], rank) for name in ("query", "key", "value")], dim=-1
    ).requires_grad_()
    out = context_parallel_attention(
        *fused.split([case.dk, case.dk, case.dv], dim=-1), **arguments(case, config, groups, layout, None, None)
    )
    out.sum().backward()
    dq, dk, dv = fused.grad.split([case.dk, case.dk, case.dv], dim=-1)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_strided_inputs_and_an_expanded_gradient_work(algorithm):
    for shape in shapes(algorithm, 4):
        case = Case(shape, seq_len=21, batch=2, heads=4, kv_heads=4, dk=4, dv=4, dtype="float64")
        got = whole(case, run_ranks(4, non_contiguous_inputs, case))
        inputs = case.inputs()
        want = attention_with_gradients(
            inputs["query"], inputs["key"], inputs["value"], torch.ones_like(inputs["grad_out"]), case.allowed(None)
        )
        for name in want:
            torch.testing.assert_close(
                got[name], want[name], atol=1e-10, rtol=0, msg=lambda m, s=shape, n=name: f"{s} {n}: {m}"
            )
