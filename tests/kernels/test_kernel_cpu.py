"""The CPU kernel's own choices: half precision is computed in float32 where the processor is slow at it."""

import pytest
import torch
from kernel_cases import backward, forward
from reference import allowed_pairs, attention_with_gradients

from mindspeed_cp.kernels import cpu
from mindspeed_cp.kernels.base import KernelOptions
from mindspeed_cp.sequence.blocks import Block

SEQ, HEADS, DIM = 96, 4, 32
CAUSAL = Block((0, SEQ), (0, SEQ), None, 0)


@pytest.fixture(autouse=True)
def _forget():
    yield
    cpu.is_slow.cache_clear()


def gradients(monkeypatch, dtype, slow):
    """(dtypes of forward's output and of what backward was given, largest error of dq, dk and dv against float64)."""
    given = []

    def noting(grad_out, *args, **kwargs):
        given.append(grad_out.dtype)
        return original(grad_out, *args, **kwargs)

    original = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    monkeypatch.setattr(cpu, "_backward", noting)
    monkeypatch.setattr(cpu, "is_slow", lambda dtype: slow)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(SEQ, 1, HEADS, DIM, generator=generator).to(dtype) for _ in range(4)]
    kernel, options = cpu.CpuKernel(), KernelOptions(DIM**-0.5)
    out, lse, rng = forward(kernel, *tensors[:3], CAUSAL, options)
    given.append(out.dtype)
    assert kernel.memory_order(dtype) == (None if slow else "heads")
    grads = backward(kernel, tensors[3], *tensors[:3], out, lse, CAUSAL, options, rng)
    want = attention_with_gradients(*tensors, allowed_pairs(SEQ, causal=True))
    return given, max(float((got.double() - want[name]).abs().max()) for name, got in zip(("dq", "dk", "dv"), grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_block_in_float32_is_at_least_as_exact(monkeypatch, dtype):
    in_half, half_error = gradients(monkeypatch, dtype, slow=False)
    converted, error = gradients(monkeypatch, dtype, slow=True)
    assert in_half == [dtype] * 2 and converted == [torch.float32] * 2
    assert error <= half_error


@pytest.mark.parametrize(
    ("machine", "supported", "expected"), [("x86_64", False, True), ("x86_64", True, False), ("aarch64", False, False)]
)
def test_processor_without_instructions_for_half_precision_is_slow_at_it(monkeypatch, machine, supported, expected):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    for dtype, queries in cpu.HALF_INSTRUCTIONS.items():
        for query in queries:
            monkeypatch.setattr(torch.cpu, query, lambda: supported, raising=False)
        assert cpu.is_slow(dtype) is expected
    assert not cpu.is_slow(torch.float32) and not cpu.is_slow(torch.float64)


def test_masks_of_batch_rows_are_not_copied_for_every_kv_head(monkeypatch):
    """float64 against the rows computed alone; the operator's mask has one row's memory."""
    seen = []

    def noting(query, key, value, dropout_p, is_causal, *, attn_mask, scale):
        seen.append(attn_mask.untyped_storage().nbytes())
        return original(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)

    original = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setattr(cpu, "_forward", noting)
    generator = torch.Generator().manual_seed(0)
    query, grad_out = torch.randn(2, SEQ, 3, 8, DIM, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, SEQ, 3, 4, DIM, dtype=torch.float64, generator=generator)
    hidden = torch.rand(3, SEQ, SEQ, generator=generator) > 0.5
    kernel, options, full = cpu.CpuKernel(), KernelOptions(DIM**-0.5), Block((0, SEQ), (0, SEQ), None, None)
    out, lse, rng = forward(kernel, query, key, value, full, options, hidden)
    grads = backward(kernel, grad_out, query, key, value, out, lse, full, options, rng, hidden)
    assert seen == [SEQ * SEQ * 8] * 3
    for row in range(3):
        alone = [tensor[:, row : row + 1] for tensor in (query, key, value, grad_out)]
        want = attention_with_gradients(*alone, ~hidden[row : row + 1])
        for name, got in zip(("out", "dq", "dk", "dv"), (out, *grads)):
            assert (got[:, row : row + 1] - want[name]).abs().max() < 1e-10, name
