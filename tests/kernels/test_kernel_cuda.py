"""The CUDA kernels against torch's schemas (fake_flash_attention), or with --device cuda on the GPU."""

import warnings

import fake_flash_attention
import pytest
import torch
from kernel_cases import BY_NAME, CASES, backward, check_block, forward, tensors

from mindspeed_cp.kernels import cuda, cudnn
from mindspeed_cp.kernels.base import KernelOptions
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.settings.notices import ContextParallelWarning

KERNELS = {"cuda": cuda, "cudnn": cudnn}


@pytest.fixture
def where(device):
    return "cuda" if device == "cuda" else "cpu"


@pytest.fixture
def calls(where):
    """The recorded operator calls; empty on a real GPU."""
    if where == "cuda":
        yield []
        return
    with fake_flash_attention.installed() as recorded:
        yield recorded


@pytest.fixture(params=KERNELS)
def kernel(request, calls, where):
    module = KERNELS[request.param]
    if where == "cuda" and module.unavailable():
        pytest.skip(module.unavailable())
    return module.build()


@pytest.mark.filterwarnings("ignore::mindspeed_cp.settings.notices.ContextParallelWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_block_equals_dense_attention(kernel, case, dtype, where):
    check_block(kernel, case, dtype, where, strided=True)


@pytest.mark.parametrize("name", ["causal", "packed_causal"])
def test_ranks_that_share_a_seed_draw_different_masks(kernel, name, where):
    case = BY_NAME[name]
    query, key, value, _, _ = tensors(case, torch.float16, where)
    outs, after = [], []
    for stream in (0, 1, 2, 1):
        torch.manual_seed(5)
        options = KernelOptions(0.25, dropout_p=0.3, rng_stream=stream)
        outs.append(forward(kernel, query, key, value, case.block, options)[0])
        after.append(torch.rand(2, device=where))
    assert torch.equal(outs[1], outs[3])
    assert not any(torch.equal(outs[a], outs[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(after[1], after[2])


@pytest.mark.parametrize("name", ["causal", "packed_causal", "packed_full", "band_window"])
def test_dropout_gradients_use_the_forward_mask(kernel, name, where):
    """out is linear in the values, so that <dv, value> equals <grad_out, out> only under one mask."""
    case = BY_NAME[name]
    query, key, value, grad_out, _ = tensors(case, torch.float16, where)
    options = KernelOptions(0.25, dropout_p=0.3)
    out, lse, rng = forward(kernel, query, key, value, case.block, options)
    other, _, _ = forward(kernel, query, key, value, case.block, options)
    assert not torch.equal(out, other)
    _, _, dv = backward(kernel, grad_out, query, key, value, out, lse, case.block, options, rng)
    expected, result = (grad_out.double() * out).sum(), (dv.double() * value).sum()
    assert abs(result - expected) < 0.02 * (grad_out.double() * out).abs().sum()


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype=torch.float32), "torch.float32 tensors"),
        (dict(dense=True), "a dense attention mask"),
        (dict(dk=264), "a head dimension of 264"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_blockwise_path_is_announced(kernel, change, reason, where):
    dtype, dk = change.get("dtype", torch.float16), change.get("dk", 16)
    query = torch.randn(3, 1, 2, dk, dtype=dtype, device=where)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool, device=where) if "dense" in change else None
    message = f"--cp-kernel {kernel.name}: flash attention does not take {reason}"
    with pytest.warns(ContextParallelWarning, match=message):
        forward(kernel, query, query, query, Block((0, 3), (0, 3)), KernelOptions(1.0), mask)


@pytest.mark.cpu_only
def test_half_precision_blocks_reach_the_fused_operators(kernel, calls):
    """Nothing falls back in silence: dense for one piece, varlen for packed ones, cuDNN only where it was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("causal", "packed_causal", "band_window", "mla_value_narrower"):
            check_block(kernel, BY_NAME[name], torch.bfloat16)
    dense = "_scaled_dot_product_cudnn_attention" if kernel.name == "cudnn" else "_flash_attention_forward"
    assert [call for call in calls if "backward" not in call[0]] == [
        (dense, False),
        ("_flash_attention_forward", True),
        ("_flash_attention_forward", False),
        (dense, False),
    ]
    assert len(calls) == 8


@pytest.mark.cpu_only
def test_an_absent_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in cuda.unavailable() and "nvidia-smi" in cudnn.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 5))
    assert "8.0" in cuda.unavailable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert cuda.unavailable() == "" and "9.0" in cudnn.unavailable()
