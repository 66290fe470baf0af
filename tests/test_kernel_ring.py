"""A whole ring in one process: every rank's blocks, one after the other, on one device and without any communication.

It needs one device whatever the ring's size, so a single GPU or NPU runs invariant 1 with its own kernel here.
"""

from contextlib import ExitStack

import fake_flash_attention
import fake_torch_npu
import pytest
import torch
from cases import Case, arguments, local_inputs, setup_of
from distributed import run_ranks
from kernel_cases import assert_matches
from reference import allowed_pairs, attention_with_gradients

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.blocks import IntervalMask, plan_blocks
from mindspeed_cp.kernels import cuda, cudnn, npu, select_kernel
from mindspeed_cp.kernels.base import KernelOptions, accumulation_dtype
from mindspeed_cp.softmax import merge_attention

HEADS, KV_HEADS, DIM, BATCH = 4, 2, 16, 2
MASKS = {
    "causal": dict(causal=True),
    "full": dict(),
    "window": dict(causal=True, window=(7, 0)),
    "two_sided_window": dict(window=(3, 5)),
    "packed": dict(causal=True, cu_seqlens=(0, 1, 8, 21, 43)),
    "packed_full": dict(cu_seqlens=(0, 8, 21, 43)),
    "packed_window": dict(causal=True, window=(4, 0), cu_seqlens=(0, 20, 43)),
}
LENGTH = 43
PLATFORMS = ("cpu", "blockwise", "cuda", "cudnn", *(f"torch_npu-{release}" for release in fake_torch_npu.RELEASES))


@pytest.fixture(params=PLATFORMS)
def kernel(request, device):
    """The kernel called by the parameter, on its fake; on a device its own kernels only."""
    name = request.param
    with ExitStack() as stack:
        if device != "cpu":
            if name not in {"cuda": ("cuda", "cudnn"), "npu": (PLATFORMS[4],)}[device]:
                pytest.skip("another device's kernel")
            yield select_kernel("npu" if device == "npu" else name, device)
        elif name.startswith("torch_npu"):
            stack.enter_context(fake_torch_npu.installed(name.split("-")[1]))
            yield npu.build()
        elif name in ("cuda", "cudnn"):
            stack.enter_context(fake_flash_attention.installed())
            yield {"cuda": cuda, "cudnn": cudnn}[name].build()
        else:
            yield select_kernel(name, "cpu")


def sample(dtype):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(LENGTH, BATCH, heads, DIM, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def simulate(kernel, tensors, cp, kind, device):
    """Every rank computes its blocks against every shard; returns (global tensors by name, pairs per rank)."""
    config = ContextParallelConfig(
        context_parallel_size=cp,
        algorithm="megatron_cp_algo",
        attention_mask_type="causal" if kind.get("causal") else "full",
    )
    layout, options = SequenceLayout.build(config, LENGTH), KernelOptions(DIM**-0.5)
    left, right = kind.get("window", (None, None))
    mask = IntervalMask(left, 0 if kind.get("causal") else right, kind.get("cu_seqlens"))
    shards = [[layout.shard(tensor, rank).to(device) for rank in range(cp)] for tensor in tensors]
    sums = [[torch.zeros_like(shard, dtype=accumulation_dtype(shard.dtype)) for shard in parts] for parts in shards[:3]]
    outs, areas = [], []
    for rank in range(cp):
        query, grad_out = shards[0][rank], shards[3][rank]
        plans = [
            (source, block)
            for source in range(cp)
            for block in plan_blocks(layout.ring_runs(rank), layout.ring_runs(source), mask, kernel.native_bands)
        ]
        out = torch.zeros_like(grad_out, dtype=accumulation_dtype(query.dtype))
        lse, rngs = torch.full(query.shape[:3], -torch.inf, dtype=out.dtype, device=device), []
        for source, block in plans:
            q, k = block.query_rows, block.key_rows
            part, part_lse, rng = kernel.forward(query[q], shards[1][source][k], shards[2][source][k], block, options)
            merge_attention(out[q], lse[q], part, part_lse)
            rngs.append(rng)
        out = out.to(query.dtype)
        for (source, block), rng in zip(plans, rngs, strict=True):
            q, k = block.query_rows, block.key_rows
            grads = kernel.backward(
                grad_out[q], query[q], shards[1][source][k], shards[2][source][k], out[q], lse[q], block, options, rng
            )
            totals = sums[0][rank], sums[1][source], sums[2][source]
            for total, rows, grad in zip(totals, (q, k, k), grads, strict=True):
                total[rows] += grad
        outs.append(out.cpu())
        areas.append(sum(block.area for _, block in plans))
    gathered = [layout.unshard([part.cpu() for part in parts]) for parts in (outs, *sums)]
    return dict(zip(("out", "dq", "dk", "dv"), gathered, strict=True)), areas


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cp", [1, 2, 3, 5, 8])
def test_a_simulated_ring_equals_dense_attention(kernel, cp, name, device):
    kind, dtype = MASKS[name], torch.bfloat16 if kernel.name in ("cuda", "cudnn") else torch.float32
    tensors = sample(dtype)
    allowed = allowed_pairs(LENGTH, **kind)
    expected = attention_with_gradients(*tensors, allowed, softmax_scale=DIM**-0.5)
    result, areas = simulate(kernel, tensors, cp, kind, device)
    for key, value in result.items():
        assert_matches(f"{key} of {name} at cp={cp}", value, expected[key], dtype)
    assert sum(areas) == int(allowed.sum()), "every visible pair is computed exactly once"


class Contiguous:
    """The CPU's kernel, which asserts that the keys and values it gets are contiguous."""

    name, native_bands = "contiguous", False

    def __init__(self):
        self._kernel, self.calls = select_kernel("cpu", "cpu"), 0

    def _check(self, *tensors):
        assert all(tensor.is_contiguous() for tensor in tensors), [tensor.stride() for tensor in tensors]
        self.calls += 1

    def forward(self, query, key, value, *others):
        self._check(key, value)
        return self._kernel.forward(query, key, value, *others)

    def backward(self, grad_out, query, key, value, *others):
        self._check(key, value)
        return self._kernel.backward(grad_out, query, key, value, *others)


def attend_contiguously(rank, case):
    """How many blocks the kernel saw, forward and backward."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config)
    layout, kernel = case.layout(), Contiguous()
    leaves, _, grad_out, mask = local_inputs(rank, case, layout)
    # As a model's projection returns them: key and value side by side for every token.
    beside = torch.cat(leaves[1:], dim=-1).detach().requires_grad_()
    split = [leaves[0], *beside.split([case.dk, case.dv], dim=-1)]
    assert not split[1].is_contiguous()
    keywords = arguments(case, config, groups, layout, None, mask) | {"kernel": kernel}
    context_parallel_attention(*split, **keywords).backward(grad_out)
    return kernel.calls


@pytest.mark.cpu_only
@pytest.mark.parametrize("policy", [None, "half", "full"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_exchange": "direct"}, {"window_size": 2}, {"algorithm": "kvallgather_cp_algo"}],
    ids=str,
)
def test_a_kernel_gets_keys_and_values_that_are_contiguous(settings, policy):
    ring = {"context_parallel_size": 4, "algorithm": "megatron_cp_algo", "kv_cache_policy": policy}
    case = Case({**ring, **settings}, seq_len=32, batch=2, dtype="float32")
    assert min(run_ranks(4, attend_contiguously, case)) >= 8
