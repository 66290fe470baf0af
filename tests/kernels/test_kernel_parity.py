"""Invariants 1, 2 and 6 with the accelerators' kernels: on their fakes in every rank, or on the device itself.

One process group serves all releases: a rank installs the fake of a release, computes every case, and goes on.
"""

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import fake_flash_attention
import fake_torch_npu
import pytest
import torch
from cases import Case, attend, device_type, expected, largest_errors, whole
from distributed import run_ranks

from mindspeed_cp.kernels import select_kernel

PLATFORMS = {**{f"torch_npu-{release}": release for release in fake_torch_npu.RELEASES}, "cuda": None, "cudnn": None}
# Largest error of out and gradients relative to the reference's largest entry.
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}


def ring(cp, **changes):
    return dict(context_parallel_size=cp, algorithm="megatron_cp_algo", **changes)


def ulysses(cp, **changes):
    return dict(context_parallel_size=cp, algorithm="ulysses_cp_algo", **changes)


BASE = dict(seq_len=37, batch=2, heads=4, kv_heads=2, dk=16, dv=16)
CASES = (
    Case(ring(4), **BASE),
    Case(ring(4, attention_mask_type="full"), **BASE),
    Case(ring(4, kv_exchange="direct", kv_cache_policy="full"), **BASE, cu_seqlens=(0, 5, 6, 20, 37)),
    Case(ring(4, window_size=2), **BASE, window=(6, 0)),
    Case(ring(4), **BASE, dense="batch"),
    Case(ring(4), **{**BASE, "dk": 24}, cu_seqlens=(0, 11, 30, 37)),
    Case(ulysses(4), **{**BASE, "seq_len": 36}, cu_seqlens=(0, 9, 10, 36)),
    Case(
        dict(context_parallel_size=4, algorithm="hybrid_cp_algo", ulysses_degree=2, kv_cache_policy="half"),
        **BASE,
        sinks=True,
    ),
    Case(dict(context_parallel_size=4, algorithm="kvallgather_cp_algo"), **{**BASE, "kv_heads": 1}),
)
PRECISION = Case(ring(4), seq_len=128, batch=1, heads=2, kv_heads=1, dk=32, dv=32)


def enter(stack, platform):
    """Make this process the platform; returns its kernel, None for the device's own."""
    if device_type() != "cpu":
        return None
    if platform.startswith("torch_npu"):
        from mindspeed_cp.kernels import npu

        stack.enter_context(fake_torch_npu.installed(PLATFORMS[platform]))
        return npu.build()
    from mindspeed_cp.kernels import cuda, cudnn

    stack.enter_context(fake_flash_attention.installed())
    return (cuda if platform == "cuda" else cudnn).build()


def attend_on(rank, platform, cases, fused=False):
    """Results of every case on this rank; ``fused`` merges blocks by the kernel's own operator."""
    with ExitStack() as stack:
        kernel = enter(stack, platform)
        if fused:
            kernel = kernel or select_kernel(None, device_type())
            merge = stack.enter_context(patch.object(kernel, "merge", wraps=kernel.merge))
            stack.callback(lambda: merge.assert_called())
        return [attend(rank, replace(case, kernel=kernel, fused_update=fused)) for case in cases]


def relative_errors(got, want):
    return {name: error / float(want[name].abs().max()) for name, error in largest_errors(got, want).items()}


def results(platform, cases, fused=False):
    """Global results of every case, computed by the ranks of one group on one platform."""
    ranks = run_ranks(cases[0].cp, attend_on, platform, cases, fused)
    return [whole(case, [shards[index] for shards in ranks]) for index, case in enumerate(cases)]


def platforms():
    return [next(iter(PLATFORMS))] if device_type() != "cpu" else list(PLATFORMS)


@pytest.mark.filterwarnings("ignore::mindspeed_cp.settings.notices.ContextParallelWarning")
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_algorithm_equals_dense_attention(platform):
    """Invariant 1 with the kernel's own precision; NVIDIA's is half precision at best."""
    if platform not in platforms():
        pytest.skip("fakes stand in for the device only where it is absent")
    dtypes = ["float32", "bfloat16"] if platform.startswith("torch_npu") else ["float16", "bfloat16"]
    cases = [replace(case, dtype=dtype) for dtype in dtypes for case in CASES]
    for case, got in zip(cases, results(platform, cases)):
        errors = relative_errors(got, expected(case))
        wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[case.dtype]}
        assert not wrong, f"{platform} {case} {case.dtype}: {wrong}"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_error_is_at_most_half_as_large_again_as_on_one_device(platform):
    """Invariant 2: the same kernel on the same inputs, cp=4 against cp=1."""
    if platform not in platforms():
        pytest.skip("fakes stand in for the device only where it is absent")
    case = replace(PRECISION, dtype="bfloat16")
    want = expected(case)
    alone = replace(case, config=ring(1))
    single, spread = (root_mean_square(results(platform, [one])[0], want) for one in (alone, case))
    too_large = {name: (spread[name], single[name]) for name in spread if spread[name] > 1.5 * single[name]}
    assert not too_large, too_large
    assert all(error > 0 for error in single.values())


def root_mean_square(got, want):
    return {name: float((got[name] - want[name]).square().mean().sqrt()) for name in want}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_two_runs_are_bitwise_equal(platform):
    """Invariant 6."""
    if platform not in platforms():
        pytest.skip("fakes stand in for the device only where it is absent")
    cases = [replace(case, dtype="bfloat16") for case in (CASES[0], CASES[2])]
    first, second = results(platform, cases), results(platform, cases)
    for one, two in zip(first, second):
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("platform", [f"torch_npu-{release}" for release in fake_torch_npu.FUSED_UPDATE_RELEASES])
def test_a_ring_with_the_fused_update_equals_dense_attention(platform):
    """--use-fused-ring-attention-update: every merge of the ring goes through npu_ring_attention_update."""
    if device_type() != "cpu" and not select_kernel(None, device_type()).has_fused_merge:
        pytest.skip("this device's kernel has no fused update")
    cases = [replace(case, dtype="float32") for case in CASES if case.config["algorithm"] == "megatron_cp_algo"]
    for case, got in zip(cases, results(platform, cases, fused=True)):
        errors = relative_errors(got, expected(case))
        assert all(error <= TOLERANCE["float32"] for error in errors.values()), f"{case}: {errors}"
