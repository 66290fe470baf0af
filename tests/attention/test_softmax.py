"""Merging partial attention: the union of disjoint key sets, in any order, without overflow."""

import pytest
import torch
from reference import attention

from mindspeed_cp.attention.merging import add_softmax_offset, softmax_offset_gradient
from mindspeed_cp.kernels.merge import merge_attention

SEQ, BATCH, HEADS, DIM = 5, 2, 3, 4


def partial(scores, value):
    """(out, lse) of scores (seq, batch, heads, keys) over value (keys, batch, heads, dim); rows of -inf give 0 and
    -inf.
    """
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return torch.einsum("sbhk,kbhd->sbhd", probs, value), lse


def problem(keys=12, scale=1.0):
    generator = torch.Generator().manual_seed(keys)
    scores = torch.randn(SEQ, BATCH, HEADS, keys, generator=generator, dtype=torch.float64) * scale
    return scores, torch.randn(keys, BATCH, HEADS, DIM, generator=generator, dtype=torch.float64)


def merged(scores, value, pieces):
    out = torch.zeros(SEQ, BATCH, HEADS, DIM, dtype=torch.float64)
    lse = torch.full((SEQ, BATCH, HEADS), -torch.inf, dtype=torch.float64)
    for piece in pieces:
        merge_attention(out, lse, *partial(scores[..., piece], value[piece]))
    return out, lse


@pytest.mark.parametrize(
    "pieces",
    [[slice(0, 12)], [slice(0, 5), slice(5, 12)], [slice(8, 12), slice(0, 1), slice(1, 8)]],
    ids=["one", "two", "three-in-another-order"],
)
def test_merging_partials_equals_attention_over_all_keys(pieces):
    scores, value = problem()
    out, lse = merged(scores, value, pieces)
    want_out, want_lse = partial(scores, value)
    torch.testing.assert_close(out, want_out, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-13, rtol=0)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_merging_does_not_overflow_with_huge_scores(scale):
    scores, value = problem(scale=scale)
    out, lse = merged(scores, value, [slice(0, 6), slice(6, 12)])
    want_out, want_lse = partial(scores, value)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(out, want_out, atol=1e-9, rtol=0)
    torch.testing.assert_close(lse, want_lse)


def test_a_row_without_keys_on_either_side_stays_zero_and_minus_infinity():
    scores, value = problem()
    scores[2, :, :, :6] = -torch.inf  # nothing in the first piece
    scores[3, :, :, 6:] = -torch.inf  # nothing in the second
    scores[4] = -torch.inf  # nothing at all
    out, lse = merged(scores, value, [slice(0, 6), slice(6, 12)])
    want_out, want_lse = partial(scores, value)
    assert not out[4].any() and (lse[4] == -torch.inf).all()
    torch.testing.assert_close(out, want_out, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-13, rtol=0)


def test_merging_works_on_views_in_place():
    scores, value = problem()
    out, lse = (torch.cat([t, t]) for t in partial(scores[..., :6], value[:6]))
    before = out.clone()
    merge_attention(out[SEQ:], lse[SEQ:], *partial(scores[..., 6:], value[6:]))
    torch.testing.assert_close(out[SEQ:], partial(scores, value)[0], atol=1e-13, rtol=0)
    assert torch.equal(out[:SEQ], before[:SEQ]), "rows outside the view changed"


@pytest.mark.parametrize("block_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_accumulator_keeps_float32_whatever_the_blocks_have(block_dtype):
    scores, value = problem()
    out, lse = (t.float() for t in partial(scores[..., :6], value[:6]))
    block_out, block_lse = partial(scores[..., 6:], value[6:])
    block_out = block_out.to(block_dtype)
    weight = torch.sigmoid(block_lse - lse.double()).unsqueeze(-1)
    want = out.double() * (1 - weight) + block_out.double() * weight
    merge_attention(out, lse, block_out, block_lse.float())
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)


def test_a_softmax_offset_is_one_more_key_with_value_zero():
    scores, value = problem()
    scores[1] = -torch.inf  # a row that sees the sink alone
    offset = torch.tensor([0.7, -2.0, 3.0], dtype=torch.float64)
    out, lse = partial(scores, value)
    add_softmax_offset(out, lse, offset)
    sink = offset.expand(SEQ, BATCH, HEADS).unsqueeze(-1)
    want_out, want_lse = partial(torch.cat([scores, sink], -1), torch.cat([value, torch.zeros_like(value[:1])]))
    torch.testing.assert_close(out, want_out, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-13, rtol=0)
    assert not out[1].any()


def test_the_gradient_of_the_offset_is_autograds():
    generator = torch.Generator().manual_seed(3)
    query, key, value, grad = (
        torch.randn(SEQ, BATCH, HEADS, DIM, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    offset = torch.tensor([0.7, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    allowed = torch.ones(1, SEQ, SEQ, dtype=torch.bool)
    allowed[0, 2] = False
    out = attention(query, key, value, allowed, sinks=offset)
    scores = torch.einsum("ibhd,jbhd->ibhj", query, key) * DIM**-0.5
    scores = scores.masked_fill(~allowed[0][:, None, None], -torch.inf)
    lse = torch.cat([scores, offset.detach().expand(SEQ, BATCH, HEADS).unsqueeze(-1)], -1).logsumexp(-1)
    (want,) = torch.autograd.grad(out, offset, grad)
    got = softmax_offset_gradient(grad, out.detach(), lse, offset.detach())
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
