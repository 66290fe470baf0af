"""The NPU kernel against the operators' published contract (fake_torch_npu), or with --device npu on the device."""

import contextlib
from dataclasses import replace

import fake_torch_npu
import pytest
import torch
from kernel_cases import BY_NAME, CASES, backward, check_block, forward, hidden, offsets, reference, tensors

from mindspeed_cp.attention.merging import PartialAttention
from mindspeed_cp.comm.workspace import Workspace
from mindspeed_cp.kernels import npu, npu_calls, npu_setup
from mindspeed_cp.kernels.base import AttentionRows, BlockResult, BlockTensors, KernelOptions
from mindspeed_cp.kernels.merge import merge_attention
from mindspeed_cp.patches.machine import npu as npu_patches
from mindspeed_cp.sequence.blocks import Block


@pytest.mark.parametrize("dtype", npu.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_npu_block_equals_dense_attention(kernel, case, dtype, where):
    check_block(kernel, case, dtype, where, strided=True)


def test_all_blocks_of_a_zigzag_rank_merge_to_dense_attention(kernel, where):
    """Backward takes the lse and out of the whole row, not of the block: the heart of ring attention."""
    case = BY_NAME["causal"]
    query, key, value, grad_out, _ = tensors(case, torch.float32, where)
    blocks = (Block((0, 4), (0, 4), None, 0), Block((4, 9), (0, 4)), Block((4, 9), (4, 9), None, 0))
    options = KernelOptions(0.3)
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf, device=where)
    for block in blocks:
        rows, keys = block.query_rows, block.key_rows
        part, part_lse, _ = forward(kernel, query[rows], key[keys], value[keys], block, options)
        merge_attention(out[rows], lse[rows], part, part_lse)
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for block in blocks:
        rows, keys = block.query_rows, block.key_rows
        tensors_of_block = query[rows], key[keys], value[keys]
        parts = backward(kernel, grad_out[rows], *tensors_of_block, out[rows], lse[rows], block, options, None)
        for grad, span, part in zip(grads, (rows, keys, keys), parts):
            grad[span] += part
    expected = reference(query, key, value, grad_out, hidden(case, None), 0.3)
    for result, wanted in zip((out, lse, *grads), expected):
        torch.testing.assert_close(result.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "packed_causal", "packed_full", "band_window", "dense_per_batch_entry"])
def test_dropout_gradients_use_the_forward_mask(kernel, name, where):
    """Directional derivative with the same (seed, offset, numels): out is linear in the values, so it is exact."""
    case = BY_NAME[name]
    query, key, value, grad_out, mask = tensors(case, torch.float32, where)
    options = KernelOptions(0.25, dropout_p=0.3)
    torch.manual_seed(5)
    out, lse, rng = forward(kernel, query, key, value, case.block, options, mask)
    torch.manual_seed(5)
    again, _, _ = forward(kernel, query, key, value, case.block, options, mask)
    other, _, _ = forward(kernel, query, key, value, case.block, options, mask)
    assert torch.equal(out, again) and not torch.equal(out, other)
    _, _, dv = backward(kernel, grad_out, query, key, value, out, lse, case.block, options, rng, mask)
    torch.testing.assert_close((dv * value).sum(), (grad_out * out).sum(), rtol=1e-4, atol=1e-4)


def test_packed_calls_stay_within_the_operator_limits(kernel, monkeypatch, where):
    """Batch entries beyond 256 heads and documents beyond 1024 are further calls with the same numbers."""
    monkeypatch.setattr(npu_calls, "MAX_HEADS", 8)
    monkeypatch.setattr(npu_calls, "MAX_PIECES", 2)
    check_block(kernel, BY_NAME["packed_causal"], torch.float32, where)
    check_block(kernel, replace(BY_NAME["packed_full"], batch=5), torch.float32, where)


def test_more_heads_than_one_call_takes_is_refused_with_a_way_out(kernel, where):
    query = torch.zeros(2, 1, 257, 16, device=where)
    with pytest.raises(ValueError, match="at most 256 heads per rank, got 257; raise --tensor-model-parallel-size"):
        forward(kernel, query, query, query, Block((0, 2), (0, 2)), KernelOptions(1.0))


def test_float64_is_refused_with_a_way_out(kernel, where):
    query = torch.zeros(2, 1, 2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not take torch.float64.*use float32"):
        forward(kernel, query, query, query, Block((0, 2), (0, 2)), KernelOptions(1.0))


def test_what_the_operators_do_not_take_is_refused_by_name(kernel, where, monkeypatch):
    query = torch.zeros(4, 1, 2, 16, device=where)
    with pytest.raises(ValueError, match=r"--attention-dropout 1.0 leaves nothing"):
        forward(kernel, query, query, query, Block((0, 4), (0, 4)), KernelOptions(1.0, dropout_p=1.0))
    assert npu.MAX_ROWS == 1 << 20
    monkeypatch.setattr(npu, "MAX_ROWS", 3)
    with pytest.raises(ValueError, match=r"at most 3 query and key rows \(S, T\).*raise --context-parallel-size"):
        forward(kernel, query, query, query, Block((0, 4), (0, 4)), KernelOptions(1.0))


@pytest.mark.parametrize("name", ["causal", "packed_causal"])
def test_ranks_that_share_a_seed_draw_different_masks(kernel, name, where):
    """rng_stream is the rank: forward differs by rank, is the same again, and backward uses forward's own mask."""
    case = BY_NAME[name]
    query, key, value, grad_out, mask = tensors(case, torch.float32, where)
    forward(kernel, query, key, value, case.block, KernelOptions(0.25), mask)  # the order of statistics, asked once
    outs, after = [], []
    for stream in (0, 1, 2, 1):
        torch.manual_seed(5)
        options = KernelOptions(0.25, dropout_p=0.3, rng_stream=stream)
        out, lse, rng = forward(kernel, query, key, value, case.block, options, mask)
        _, _, dv = backward(kernel, grad_out, query, key, value, out, lse, case.block, options, rng, mask)
        torch.testing.assert_close((dv * value).sum(), (grad_out * out).sum(), rtol=1e-4, atol=1e-4)
        outs.append(out)
        after.append(torch.rand(2, device=where))
    assert torch.equal(outs[1], outs[3])
    assert not any(torch.equal(outs[a], outs[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(after[1], after[2])  # whatever the rank, the generator goes on alike


@pytest.mark.cpu_only
@pytest.mark.parametrize("tnd_order", ["documents", "heads"])
def test_an_old_cann_without_softmax_layout_is_found_out_once(tnd_order):
    """The Python schema has the argument, and CANN below 8.3 raises when it is used."""
    with fake_torch_npu.installed("2.13.0", tnd_order, cann=(8, 2)) as torch_npu:
        kernel = npu.build()
        for name in ("packed_causal", "packed_full", "packed_mla"):
            check_block(kernel, BY_NAME[name], torch.float32)
        calls = [arguments for _, arguments in torch_npu.operators.calls]
    assert sum(call.softmax_layout == "TND" for call in calls) == 1
    assert len([call for call in calls if len(call.query) == 3]) == 2


@pytest.mark.cpu_only
def test_open_bands_name_limits_that_int32_can_add(kernel, torch_npu):
    for name in ("band_left_only", "band_left_only_with_more_keys", "band_window"):
        check_block(kernel, BY_NAME[name], torch.float32)
    calls = [arguments for _, arguments in operator_calls(torch_npu)]
    assert len(calls) == 6 and all(0 <= call.pre_tockens + call.next_tockens < 100 for call in calls)


@pytest.mark.cpu_only
def test_statistics_are_made_once_for_blocks_that_share_their_query_rows(kernel, monkeypatch):
    made = []
    original = npu.from_lse
    monkeypatch.setattr(npu, "from_lse", lambda lse: made.append(lse.shape) or original(lse))
    query = torch.randn(4, 1, 2, 16)
    block, options = Block((0, 4), (0, 4)), KernelOptions(0.25)
    blocks = BlockTensors(block, query, query, query)
    result = kernel.forward(blocks, options)
    rows = AttentionRows(result.out, result.out, result.lse)
    for _ in range(3):
        first = kernel.backward(blocks, rows, options, None)
    assert len(made) == 1
    result.lse.add_(1)  # the same memory with other numbers, in another backward pass
    second = kernel.backward(blocks, AttentionRows(result.out, result.out, result.lse), options, None)
    assert len(made) == 2 and not torch.equal(first[2], second[2])


def operator_calls(torch_npu):
    """What the kernel asked the fake for, less the three-token question about the order of statistics."""
    return [(name, arguments) for name, arguments in torch_npu.operators.calls if len(arguments.query) != 3]


@pytest.mark.cpu_only
def test_causal_calls_share_one_compressed_mask(kernel, torch_npu):
    for name in ("causal", "packed_causal", "band_window"):
        check_block(kernel, BY_NAME[name], torch.float16)
    masks = [arguments.atten_mask for _, arguments in operator_calls(torch_npu)]
    assert len(masks) == 6 and len({mask.data_ptr() for mask in masks}) == 1 and masks[0].shape == (2048, 2048)


@pytest.mark.cpu_only
def test_full_blocks_pass_no_mask_and_packed_blocks_cumulative_lengths(kernel, torch_npu):
    check_block(kernel, BY_NAME["full"], torch.float16)
    check_block(kernel, BY_NAME["packed_full"], torch.float16)
    calls = [arguments for _, arguments in operator_calls(torch_npu)]
    assert [call.input_layout for call in calls] == ["SBH", "SBH", "TND", "TND"]
    assert all(call.atten_mask is None for call in calls)
    assert calls[2].actual_seq_qlen == [3, 4, 10] and calls[2].actual_seq_kvlen == [5, 7, 11]
    assert calls[2].key.shape[1] == 2 * 2  # KV heads are not repeated


def test_fused_ring_update_gives_the_numbers_of_the_plain_merge(torch_npu, kernel, where):
    if not hasattr(torch_npu, "npu_ring_attention_update"):
        assert not kernel.has_fused_merge
        return
    generator = torch.Generator().manual_seed(1)
    out, block_out = (torch.randn(6, 2, 4, 16, generator=generator) for _ in range(2))
    lse, block_lse = (torch.randn(6, 2, 4, generator=generator) * 30 for _ in range(2))
    lse[0], out[0] = -torch.inf, 0
    block_lse[1], block_out[1] = -torch.inf, 0
    lse[2], block_lse[2], out[2], block_out[2] = -torch.inf, -torch.inf, 0, 0
    fused = [tensor.clone().to(where) for tensor in (out, lse)]
    kernel.merge(*fused, None, BlockResult(block_out.to(where, torch.bfloat16), block_lse.to(where)))
    merge_attention(out, lse, block_out.bfloat16(), block_lse)
    for result, expected in zip(fused, (out, lse)):
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "torch_npu", [(release, "documents") for release in fake_torch_npu.FUSED_UPDATE_RELEASES], indirect=True
)
def test_fused_merges_take_the_statistics_that_the_operators_gave(kernel, torch_npu, monkeypatch):
    """None is made from lse, but for the later rows of a zigzag rank when their own blocks begin."""
    rows, later = 8, slice(4, 8)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(n, 2, 4, 16, generator=generator) * 3 for n in (rows, 4 * rows, 4 * rows))
    made = []
    original = npu.from_lse
    monkeypatch.setattr(npu, "from_lse", lambda lse: made.append(lse.shape) or original(lse))
    options, partial = KernelOptions(0.25, fused_merge=True), PartialAttention(Workspace(), kernel.merge, query, 16)
    for step, spans in enumerate((slice(0, 8), slice(0, 8), slice(0, 8), later, later)):
        keys = slice(6 * step, 6 * step + 6)
        block = Block((0, spans.stop - spans.start), (0, 6))
        part = kernel.forward(BlockTensors(block, query[spans], key[keys], value[keys]), options)
        partial.add(spans, slice(None), part)
    out, lse = partial.result()
    assert made == [torch.Size([2, 4, 4])]  # four merges made one: the later rows' first
    scores = torch.einsum("sbhd,tbhd->sbht", query.double(), key.double()) * 0.25
    scores[:4, ..., 18:] = -torch.inf
    wanted = torch.einsum("sbht,tbhd->sbhd", scores[..., :30].softmax(-1), value[:30].double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), scores[..., :30].logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert kernel.forward(BlockTensors(block, query[later], key[:6], value[:6]), KernelOptions(0.25)).statistics is None


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "error, message",
    [
        (ModuleNotFoundError("No module named 'torch_npu'"), "pip install torch_npu=="),
        (
            ImportError("libhccl.so: cannot open shared object file"),
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        ),
    ],
)
def test_a_missing_installation_says_what_to_install_and_source(monkeypatch, error, message):
    def fail(name):
        raise error

    monkeypatch.setattr(npu_setup, "import_module", fail)
    assert message in npu.unavailable()
    with pytest.raises(ValueError, match="the NPU cannot be used here"):
        npu_patches.prepare_npu()


@pytest.mark.cpu_only
def test_prepare_npu_imports_transfer_to_npu_and_needs_no_apex(torch_npu, monkeypatch):
    imported = []
    real = npu_setup.import_module
    for module in (npu_setup, npu_patches):
        monkeypatch.setattr(module, "import_module", lambda name: imported.append(name) or real(name))
    npu_patches.prepare_npu()
    assert imported == ["torch_npu", "torch_npu.contrib.transfer_to_npu"]
    torch_npu.npu.is_available = lambda: False
    with contextlib.suppress(ValueError):
        npu_patches.prepare_npu()
    assert "npu-smi info" in npu.unavailable()


@pytest.mark.cpu_only
def test_packed_calls_ask_for_an_order_where_the_releases_schema_has_it(torch_npu):
    unordered = torch_npu.__version__ in fake_torch_npu.UNORDERED_RELEASES
    assert npu.packed_arguments(torch_npu) == ({} if unordered else {"softmax_layout": "TND"})


def test_cumulative_lengths_carry_no_leading_zero():
    assert npu_calls.cumulative((2, 3, 1)) == list(offsets(2, 3, 1)[1:])
