"""The NPU kernel against the operators' published contract (fake_torch_npu), or with --device npu on the device."""

import contextlib
from dataclasses import replace

import fake_torch_npu
import pytest
import torch
from kernel_cases import BY_NAME, CASES, check_block, hidden, offsets, reference, tensors
from mindspeed_cp.patches import npu as npu_patches
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_cp.blocks import Block
from mindspeed_cp.kernels import npu, npu_setup
from mindspeed_cp.kernels.base import KernelOptions
from mindspeed_cp.softmax import merge_attention

VARIANTS = [(release, "documents") for release in fake_torch_npu.RELEASES]
VARIANTS += [(release, "heads") for release in fake_torch_npu.UNORDERED_RELEASES]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(variant))
def torch_npu(request, device):
    """The fake of every release, or once the real module."""
    if device == "npu":
        if request.param != VARIANTS[0]:
            pytest.skip("a real torch_npu is one release")
        yield pytest.importorskip("torch_npu")
        return
    with fake_torch_npu.installed(*request.param) as module:
        yield module


@pytest.fixture
def kernel(torch_npu):
    return npu.build()


@pytest.fixture
def where(device):
    return "npu" if device == "npu" else "cpu"


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
        part, part_lse, _ = kernel.forward(query[rows], key[keys], value[keys], block, options)
        merge_attention(out[rows], lse[rows], part, part_lse)
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for block in blocks:
        rows, keys = block.query_rows, block.key_rows
        parts = kernel.backward(
            grad_out[rows], query[rows], key[keys], value[keys], out[rows], lse[rows], block, options, None
        )
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
    out, lse, rng = kernel.forward(query, key, value, case.block, options, mask)
    torch.manual_seed(5)
    again, _, _ = kernel.forward(query, key, value, case.block, options, mask)
    other, _, _ = kernel.forward(query, key, value, case.block, options, mask)
    assert torch.equal(out, again) and not torch.equal(out, other)
    _, _, dv = kernel.backward(grad_out, query, key, value, out, lse, case.block, options, rng, mask)
    torch.testing.assert_close((dv * value).sum(), (grad_out * out).sum(), rtol=1e-4, atol=1e-4)


def test_packed_calls_stay_within_the_operator_limits(kernel, monkeypatch, where):
    """Batch entries beyond 256 heads and documents beyond 1024 are further calls with the same numbers."""
    monkeypatch.setattr(npu, "MAX_HEADS", 8)
    monkeypatch.setattr(npu, "MAX_PIECES", 2)
    check_block(kernel, BY_NAME["packed_causal"], torch.float32, where)
    check_block(kernel, replace(BY_NAME["packed_full"], batch=5), torch.float32, where)


def test_more_heads_than_one_call_takes_is_refused_with_a_way_out(kernel, where):
    query = torch.zeros(2, 1, 257, 16, device=where)
    with pytest.raises(ValueError, match="at most 256 heads per rank, got 257; raise --tensor-model-parallel-size"):
        kernel.forward(query, query, query, Block((0, 2), (0, 2)), KernelOptions(1.0))


def test_float64_is_refused_with_a_way_out(kernel, where):
    query = torch.zeros(2, 1, 2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not take torch.float64.*choose --cp-kernel blockwise"):
        kernel.forward(query, query, query, Block((0, 2), (0, 2)), KernelOptions(1.0))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(
    "block",
    [
        Block((0, 3072), (0, 3072), None, 0),
        Block((0, 2048, 3072), (0, 2048, 3072), None, 0),
        Block((0, 3072), (0, 3072), 0, None),
        Block((0, 3072), (0, 3072)),
    ],
    ids=["causal", "packed", "band", "full"],
)
def test_no_tensor_of_sequence_squared_elements_exists(kernel, block, where):
    npu.compressed_mask.cache_clear()
    query = torch.randn(3072, 1, 1, 16, dtype=torch.bfloat16, device=where)
    with LargestTensor() as mode, torch.no_grad():
        out, lse, rng = kernel.forward(query, query, query, block, KernelOptions(0.25))
        kernel.backward(out, query, query, query, out, lse, block, KernelOptions(0.25), rng)
    assert 3072 * 16 <= mode.largest <= 2048 * 2048 < 3072 * 3072


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
        assert not hasattr(kernel, "merge")
        return
    generator = torch.Generator().manual_seed(1)
    out, block_out = (torch.randn(6, 2, 4, 16, generator=generator) for _ in range(2))
    lse, block_lse = (torch.randn(6, 2, 4, generator=generator) * 30 for _ in range(2))
    lse[0], out[0] = -torch.inf, 0
    block_lse[1], block_out[1] = -torch.inf, 0
    lse[2], block_lse[2], out[2], block_out[2] = -torch.inf, -torch.inf, 0, 0
    fused = [tensor.clone().to(where) for tensor in (out, lse)]
    kernel.merge(*fused, block_out.to(where, torch.bfloat16), block_lse.to(where))
    merge_attention(out, lse, block_out.bfloat16(), block_lse)
    for result, expected in zip(fused, (out, lse)):
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(atten_mask=torch.ones(9, 9, dtype=torch.bool).triu(1)), "compressed mask of 2048 x 2048"),
        (dict(query=torch.zeros(9, 1, 64, dtype=torch.float64)), "must be float16, bfloat16 or float32"),
        (dict(head_num=3), "must divide by head_num"),
        (dict(key=torch.zeros(9, 1, 48), value=torch.zeros(9, 1, 48)), "multiple of 3 KV heads"),
        (dict(value=torch.zeros(9, 1, 128)), "must not exceed key's"),
        (dict(keep_prob=0.0), r"must lie in \(0, 1\]"),
        (dict(actual_seq_qlen=[9], actual_seq_kvlen=[9]), "TND only"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_the_fake_refuses_what_the_documentation_refuses(torch_npu, change, message):
    arguments = dict(
        query=torch.zeros(9, 1, 64),
        key=torch.zeros(9, 1, 64),
        value=torch.zeros(9, 1, 64),
        head_num=4,
        input_layout="SBH",
        atten_mask=npu.compressed_mask(torch.device("cpu")),
        sparse_mode=2,
    )
    torch_npu.npu_fusion_attention(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(**arguments | change)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "ends, message", [([0, 4, 9], "must not begin with 0"), ([4, 8], "ends at 8"), ([9, 4], "decrease")], ids=str
)
def test_the_fake_refuses_wrong_cumulative_lengths(torch_npu, ends, message):
    rows = torch.zeros(9, 4, 16)
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(rows, rows, rows, 4, "TND", actual_seq_qlen=ends, actual_seq_kvlen=[4, 9])


@pytest.mark.cpu_only
def test_the_published_schemas_reject_wrong_names_and_positional_keywords(torch_npu):
    rows = torch.zeros(9, 1, 64)
    with pytest.raises(RuntimeError, match="attn_mask"):
        torch_npu.npu_fusion_attention(rows, rows, rows, 4, "SBH", attn_mask=None)
    with pytest.raises(RuntimeError, match="positional"):
        torch_npu.npu_fusion_attention_grad(rows, rows, rows, rows, 4, "SBH", None)


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
def test_every_release_selects_a_variant_by_its_schema(torch_npu):
    expected = None if torch_npu.__version__ in fake_torch_npu.UNORDERED_RELEASES else "softmax_layout"
    assert npu.operator_variant(torch_npu).marker == expected


def test_cumulative_lengths_carry_no_leading_zero():
    assert npu._cumulative((2, 3, 1)) == list(offsets(2, 3, 1)[1:])
