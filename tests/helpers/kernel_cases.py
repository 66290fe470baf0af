"""Blocks of every shape and a dense float64 reference, for tests of every kernel."""

from dataclasses import dataclass

import torch

from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions
from mindspeed_cp.sequence.blocks import Block

# Largest error of out, lse and gradients relative to the largest entry of the reference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class BlockCase:
    """A block and its tensors' sizes; dense mask: None, "shared" (1, nq, nk), "batch" (batch, nq, nk), "empty rows"."""

    name: str
    block: Block
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dk: int = 16
    dv: int = 16
    dense: str | None = None

    def __str__(self):
        return self.name


def offsets(*lengths):
    total, ends = 0, [0]
    for length in lengths:
        ends.append(total := total + length)
    return tuple(ends)


CASES = (
    BlockCase("full", Block((0, 7), (0, 11))),
    BlockCase("full_with_offset_rows", Block((3, 10), (5, 9))),
    BlockCase("causal", Block((0, 9), (0, 9), None, 0)),
    BlockCase("causal_mha", Block((0, 9), (0, 9), None, 0), kv_heads=4),
    BlockCase("causal_mqa", Block((0, 9), (0, 9), None, 0), kv_heads=1),
    BlockCase("one_row", Block((0, 1), (0, 1), None, 0), batch=1),
    BlockCase("mla_value_narrower", Block((0, 9), (0, 9), None, 0), dk=24, dv=16),
    BlockCase("value_wider", Block((0, 9), (0, 9), None, 0), dk=16, dv=24),
    BlockCase("dimensions_that_8_does_not_divide", Block((0, 9), (0, 9), None, 0), dk=20, dv=12),
    BlockCase("packed_dimensions_that_8_does_not_divide", Block(offsets(4, 5), offsets(4, 5), None, 0), dk=20, dv=12),
    BlockCase("packed_full", Block(offsets(3, 1, 6), offsets(5, 2, 4))),
    BlockCase("packed_causal", Block(offsets(3, 1, 6), offsets(3, 1, 6), None, 0)),
    BlockCase("packed_causal_one_batch_entry", Block((4, 7, 12), (4, 7, 12), None, 0), batch=1),
    BlockCase("packed_mla", Block(offsets(4, 5), offsets(4, 5), None, 0), dk=24, dv=16),
    BlockCase("band_window", Block((0, 6), (0, 9), 0, 3)),
    BlockCase("band_left_only", Block((0, 6), (0, 6), 0, None)),
    BlockCase("band_left_only_with_more_keys", Block((0, 6), (0, 8), 0, None)),
    BlockCase("dense_shared", Block((0, 7), (0, 10)), dense="shared"),
    BlockCase("dense_per_batch_entry", Block((0, 7), (0, 10)), dense="batch"),
    BlockCase("dense_with_empty_rows", Block((0, 7), (0, 10)), dense="empty rows"),
)
BY_NAME = {case.name: case for case in CASES}


def tensors(case, dtype, device="cpu", seed=0):
    """(query, key, value, grad_out, attention_mask) of a case."""
    generator = torch.Generator().manual_seed(seed)
    nq, nk = (rows.stop - rows.start for rows in (case.block.query_rows, case.block.key_rows))
    query, key, value, grad_out = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in (
            (nq, case.batch, case.heads, case.dk),
            (nk, case.batch, case.kv_heads, case.dk),
            (nk, case.batch, case.kv_heads, case.dv),
            (nq, case.batch, case.heads, case.dv),
        )
    )
    mask = None
    if case.dense:
        mask = torch.rand(1 if case.dense == "shared" else case.batch, nq, nk, generator=generator) < 0.4
        mask[..., 0] = False
        if case.dense == "empty rows":
            mask[0, 2], mask[1, 5] = True, True
        mask = mask.to(device)
    return query, key, value, grad_out, mask


def hidden(case, mask):
    """Bool (1 or batch, nq, nk): the pairs that the block or its dense mask hides."""
    nq, nk = (rows.stop - rows.start for rows in (case.block.query_rows, case.block.key_rows))
    result = torch.ones(nq, nk, dtype=torch.bool)
    for q, k in case.block.pieces():
        offset = torch.arange(k.stop - k.start) - torch.arange(q.stop - q.start).unsqueeze(1)
        piece = torch.zeros_like(offset, dtype=torch.bool)
        if case.block.lower is not None:
            piece |= offset < case.block.lower
        if case.block.upper is not None:
            piece |= offset > case.block.upper
        result[q, k] = piece
    return result[None] if mask is None else result[None] | mask.cpu()


def reference(query, key, value, grad_out, blocked, scale, dropped=None):
    """Dense float64 (out, lse, dq, dk, dv); ``dropped`` multiplies the probabilities (batch, heads, nq, nk)."""
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in (query, key, value)]
    q, k, v = (leaf.permute(1, 2, 0, 3) for leaf in leaves)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(blocked.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    out = (probs if dropped is None else probs * dropped) @ v
    out = out.permute(2, 0, 1, 3)
    grads = torch.autograd.grad(out, leaves, grad_out.detach().cpu().double())
    return out.detach(), lse.detach().permute(2, 0, 1), *grads


def assert_matches(name, result, expected, dtype, factor=1.0):
    result = result.detach().cpu().double()
    assert result.shape == expected.shape, f"{name} has shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(result), finite), f"{name}: infinities differ"
    assert torch.equal(result[~finite], expected[~finite]), f"{name}: infinities differ in sign"
    scale = expected[finite].abs().max().clamp(min=1.0) if finite.any() else 1.0
    error = (result[finite] - expected[finite]).abs().max() / scale if finite.any() else 0.0
    assert error <= factor * TOLERANCE[dtype], f"{name} is off by {error:.2e} of its largest entry"


def forward(kernel, query, key, value, block, options, mask=None):
    """(out, lse, saved) of one block."""
    out, lse, saved, _ = kernel.forward(BlockTensors(block, query, key, value, mask), options)
    return out, lse, saved


def backward(kernel, grad_out, query, key, value, out, lse, block, options, saved, mask=None):
    """(dq, dk, dv) of one block; out and lse are those of the whole attention."""
    tensors = BlockTensors(block, query, key, value, mask)
    return kernel.backward(tensors, AttentionRows(grad_out, out, lse), options, saved)


def check_block(kernel, case, dtype, device="cpu", strided=False):
    """Check that forward and backward of one block equal dense attention."""
    query, key, value, grad_out, mask = tensors(case, dtype, device)
    if strided:  # keys and values arrive as slices of one packed buffer
        packed = torch.cat([key, value], -1)
        key, value = packed[..., : case.dk], packed[..., case.dk :]
    scale = case.dk**-0.5
    options = KernelOptions(scale)
    out, lse, saved = forward(kernel, query, key, value, case.block, options, mask)
    expected = reference(query, key, value, grad_out, hidden(case, mask), scale)
    assert_matches("out", out, expected[0], dtype)
    assert_matches("lse", lse, expected[1], dtype)
    whole_lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # what the engine passes for rows without any key
    grads = backward(kernel, grad_out, query, key, value, out, whole_lse, case.block, options, saved, mask)
    for name, grad, wanted in zip(("dq", "dk", "dv"), grads, expected[2:]):
        assert_matches(name, grad, wanted, dtype)
