"""A whole ring in one process: every rank's blocks, one after the other, on one device and without any communication.

It needs one device whatever the ring's size, so a single GPU or NPU runs invariant 1 with its own kernel here.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import fake_flash_attention
import fake_torch_npu
import pytest
import torch
from cases import Case, arguments, local_inputs, setup_of
from distributed import run_ranks
from kernel_cases import assert_matches, backward, forward
from reference import allowed_pairs, attention_with_gradients

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.comm.batch import Batch
from mindspeed_cp.kernels import cuda, cudnn, npu, select_kernel
from mindspeed_cp.kernels.base import AttentionKernel, KernelOptions, accumulation_dtype
from mindspeed_cp.kernels.merge import merge_attention
from mindspeed_cp.sequence.blocks import plan_blocks
from mindspeed_cp.sequence.slice_mask import document_mask

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
    mask = document_mask(left, 0 if kind.get("causal") else right, kind.get("cu_seqlens"))
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
            part, part_lse, rng = forward(kernel, query[q], shards[1][source][k], shards[2][source][k], block, options)
            merge_attention(out[q], lse[q], part, part_lse)
            rngs.append(rng)
        out = out.to(query.dtype)
        for (source, block), rng in zip(plans, rngs, strict=True):
            q, k = block.query_rows, block.key_rows
            read = query[q], shards[1][source][k], shards[2][source][k]
            grads = backward(kernel, grad_out[q], *read, out[q], lse[q], block, options, rng)
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


@pytest.mark.parametrize("cp", [1, 3, 4])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_document(kernel, cp, poison, device):
    """A rank's chunk begins with the last token of a document, beside a document of one token."""
    dtype = torch.bfloat16 if kernel.name in ("cuda", "cudnn") else torch.float32
    tensors = sample(dtype)
    first = 1 + (LENGTH // (2 * cp) + 1 if cp > 1 else 0)  # the second chunk's first token, and a single one
    kind = dict(causal=True, cu_seqlens=(0, first, first + 1, LENGTH))
    expected = attention_with_gradients(*tensors, allowed_pairs(LENGTH, **kind), softmax_scale=DIM**-0.5)
    for tensor in tensors:
        tensor[:first] = poison
    for name, result in simulate(kernel, tensors, cp, kind, device)[0].items():
        assert_matches(name, result[first:], expected[name][first:], dtype)


class Asking(AttentionKernel):
    """The CPU's kernel, which asks for an order of memory and asserts on every call that it got it."""

    name, native_bands = "asking", False

    def __init__(self, order):
        self._kernel, self._order, self.calls = select_kernel("cpu", "cpu"), order, 0

    def memory_order(self, dtype):
        return self._order

    def _check(self, shared, blocks):
        self.calls += 1
        if self._order == "sequence":
            assert all(tensor.is_contiguous() for tensor in (*shared, *blocks))
            return
        for tensor in blocks:
            assert tensor.stride()[::3] == (tensor.shape[3], 1), tensor.stride()

    def forward(self, tensors, options):
        self._check([tensors.query], [tensors.key, tensors.value])
        return self._kernel.forward(tensors, options)

    def backward(self, tensors, rows, options, saved):
        self._check([rows.grad_out, tensors.query], [tensors.key, tensors.value])
        return self._kernel.backward(tensors, rows, options, saved)


ORDERS = ("sequence", "heads")


def attend_in_order(rank, cases):
    """For every case and order: (blocks that the kernel saw, messages that were copied, by purpose)."""
    from mindspeed_cp import context_parallel_attention

    seen = []
    for case in cases:
        config, groups = setup_of(case.config, case.share_from)
        layout = case.layout()
        leaves, _, grad_out, mask = local_inputs(rank, case, layout)
        # As a model's projection returns them: key and value side by side for every token.
        beside = torch.cat(leaves[1:], dim=-1).detach().requires_grad_()
        queries = torch.cat([leaves[0], leaves[0]], dim=-1).detach().requires_grad_()
        grads, found = {}, []
        for order in (None, *ORDERS):
            split = queries.chunk(2, dim=-1)[0], *beside.split([case.dk, case.dv], dim=-1)
            assert not any(tensor.is_contiguous() for tensor in split)
            kernel, copied = Asking(order) if order else None, []
            keywords = arguments(case, config, groups, layout, None, mask) | {"kernel": kernel}
            with mock.patch.object(Batch, "post", noting_copies(copied)):
                out = context_parallel_attention(*split, **keywords)
                # Of a sum over the output, say: strides that no kernel takes as they are.
                gradient = torch.stack([grad_out, grad_out], dim=-1)[..., 0]
                grads[order] = out, *torch.autograd.grad(out, (queries, beside), gradient)
            if kernel:
                found.append((kernel.calls, Counter(copied)))
        for order in ORDERS:
            assert all(torch.allclose(*pair, atol=1e-10) for pair in zip(grads[order], grads[None])), (case, order)
        seen.append(found)
    return seen


def noting_copies(copied):
    """``Batch.post``, which notes the purpose of messages that are no piece of memory."""
    original = Batch.post

    def post(batch):
        copied.extend([batch.purpose] * len(batch._loans._lent))
        return original(batch)

    return post


RINGS = [
    {"algorithm": "megatron_cp_algo", "kv_cache_policy": policy, **exchange}
    for policy in (None, "half", "full")
    for exchange in ({}, {"kv_exchange": "direct"}, {"window_size": 2})
]
GATHERED = [{"algorithm": "kvallgather_cp_algo", "kv_cache_policy": policy} for policy in (None, "half", "full")]
SCATTERED = [
    {"algorithm": "ulysses_cp_algo", "kv_cache_policy": policy, **how}
    for policy in (None, "half", "full")
    for how in ({}, {"alltoall": False})
]
HYBRIDS = [
    {"algorithm": "hybrid_cp_algo", "ulysses_degree": 2, "kv_cache_policy": policy, **exchange}
    for policy in (None, "half", "full")
    for exchange in ({}, {"kv_exchange": "direct"})
]


@pytest.mark.cpu_only
def test_a_kernel_gets_the_order_of_memory_that_it_asks_for():
    plain = [
        Case({"context_parallel_size": 4, **setting}, seq_len=32, batch=2, heads=8, share_from=(None, 0)[index % 2])
        for index, setting in enumerate([*RINGS, *GATHERED, *SCATTERED, *HYBRIDS])
    ]
    packed = [replace(case, cu_seqlens=(0, 3, 20, 32), dv=6) for case in plain[1::3]]
    one_head = Case({"context_parallel_size": 4, "allgather_kv": True}, batch=2, heads=8, kv_heads=1)
    for rank in run_ranks(4, attend_in_order, [*plain, *packed, one_head]):
        assert all(calls for found in rank for calls, _ in found)


@pytest.mark.cpu_only
def test_whole_shards_travel_without_a_copy_in_any_order():
    cases = [
        Case({"context_parallel_size": 4, **setting}, seq_len=32, batch=2, share_from=None)
        for setting in (*RINGS, *GATHERED)
        if "kv_exchange" not in setting
    ]
    for rank in run_ranks(4, attend_in_order, cases):
        assert [copied["kv"] for found in rank for _, copied in found] == [0] * len(cases) * len(ORDERS)
