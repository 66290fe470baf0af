"""Dropout: the mask of the forward pass is recovered from its output, and the gradients must be those of that very
mask.
"""

from dataclasses import replace

import pytest
import torch
from cases import Case, arguments, attend, setup_of, whole
from distributed import run_ranks
from reference import attention, attention_with_gradients
from setups import ALGORITHM_AND_SIZE, degree_of, exchanges, shapes

from mindspeed_cp.kernels.base import AttentionKernel
from mindspeed_cp.settings.algorithms import ALGORITHMS

pytestmark = pytest.mark.cpu_only
PROBABILITY = 0.3


def attend_to_positions(rank, case):
    """attend with the identity as values: out[i, h, j] is the dropped probability of key j, so the mask can be read off
    it.
    """
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config)
    layout, inputs = case.layout(), case.inputs()
    inputs["value"] = identity_values(case)
    leaves = [layout.shard(inputs[name], rank).clone().requires_grad_() for name in ("query", "key", "value")]
    torch.manual_seed(case.seed + rank)
    out = context_parallel_attention(*leaves, **arguments(case, config, groups, layout, None, inputs["attention_mask"]))
    out.backward(layout.shard(inputs["grad_out"], rank))
    return {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("qkv", leaves)}}


def identity_values(case):
    assert case.dv == case.seq_len
    return (
        torch.eye(case.seq_len, dtype=torch.float64)[:, None, None]
        .expand(-1, case.batch, case.kv_heads, -1)
        .contiguous()
    )


def probabilities(case):
    """(seq_q, batch, heads, seq_k) without dropout."""
    inputs = case.inputs()
    return attention(inputs["query"], inputs["key"], identity_values(case), case.allowed(inputs["attention_mask"]))


def recovered_mask(case, out):
    """Factors (batch, heads, seq_q, seq_k), 0 or 1 / (1 - p), that the forward pass applied."""
    probs = probabilities(case)
    factors = torch.where(probs > 0, out / probs.clamp(min=1e-300), 0.0)
    kept = (factors > 0.5).double()
    torch.testing.assert_close(factors, kept / (1 - case.dropout_p), atol=1e-8, rtol=0)
    return (kept / (1 - case.dropout_p)).permute(1, 2, 0, 3), kept[probs > 0].mean()


def dropout_case(shape, **options):
    length = options.pop("seq_len", 22)
    return Case(
        shape,
        seq_len=length,
        dv=length,
        batch=2,
        heads=2 * degree_of(shape),
        kv_heads=degree_of(shape),
        dropout_p=PROBABILITY,
        dtype="float64",
        **options,
    )


def check_gradients(case):
    """Compare with the dense reference under the recovered mask; returns the mask."""
    got = whole(case, run_ranks(case.cp, attend_to_positions, case))
    keep, share = recovered_mask(case, got["out"])
    assert 0.6 < share < 0.8, f"kept {share:.2f} of the weights at p = {PROBABILITY}"
    inputs = case.inputs()
    want = attention_with_gradients(
        inputs["query"],
        inputs["key"],
        identity_values(case),
        inputs["grad_out"],
        case.allowed(inputs["attention_mask"]),
        keep=keep,
    )
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], atol=1e-9, rtol=0, msg=lambda text, name=name: f"{case} {name}: {text}"
        )
    return keep


@pytest.mark.parametrize("algorithm, cp", [point for point in ALGORITHM_AND_SIZE if point.values[1] <= 4])
def test_backward_uses_exactly_the_mask_of_forward(algorithm, cp):
    for shape in shapes(algorithm, cp):
        for exchange in exchanges(shape):
            for policy in (None, "full", "half") if cp > 1 else (None,):
                check_gradients(dropout_case({**shape, "kv_exchange": exchange, "kv_cache_policy": policy}))


@pytest.mark.parametrize(
    "options",
    [
        {"cu_seqlens": (0, 3, 3, 15, 22)},
        {"window": (6, 0)},
        {"dense": "batch"},
        {"cu_seqlens": (0, 1, 9, 22), "window": (4, 0)},
    ],
    ids=["packed", "window", "dense", "packed-window"],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_backward_uses_the_mask_of_forward_with_every_attention_mask(algorithm, options):
    for shape in shapes(algorithm, 4):
        check_gradients(dropout_case(shape, **options))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_heads_and_batches_are_dropped_independently(algorithm):
    shape = next(shapes(algorithm, 4))
    keep = check_gradients(dropout_case({**shape, "attention_mask_type": "full"})) > 0
    flat = keep.flatten(0, 1).flatten(1)
    agreement = (flat[:, None] == flat[None]).double().mean(-1)
    independent = PROBABILITY**2 + (1 - PROBABILITY) ** 2
    others = agreement[~torch.eye(len(flat), dtype=torch.bool)]
    assert others.max() < independent + 0.15, "two heads share a mask"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_seed_decides_the_mask(algorithm):
    case = replace(dropout_case(next(shapes(algorithm, 4))), dv=22)
    first, again = run_ranks(4, attend, case), run_ranks(4, attend, case)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again) for name in a)
    other = run_ranks(4, attend_with_seed, case, 99)
    assert not torch.equal(other[3]["out"], first[3]["out"])


def attend_with_seed(rank, case, seed):
    manual_seed = torch.manual_seed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda _: manual_seed(seed + rank))
        return attend(rank, case)


def attend_all_dropped(rank, case):
    return attend(rank, replace(case, dropout_p=1.0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dropping_everything_gives_zeros_and_no_nan(algorithm):
    case = Case(next(shapes(algorithm, 4)), seq_len=9)
    for result in run_ranks(4, attend_all_dropped, case):
        assert all(not tensor.any() for tensor in result.values())


class Fused(AttentionKernel):
    """A kernel that divides by the probability of keeping, as the operators of GPUs and NPUs do."""

    name, native_bands = "fused", False

    def forward(self, tensors, options):
        raise ZeroDivisionError(f"{1 - options.dropout_p} are kept")

    backward = forward


def test_no_fused_kernel_is_asked_to_drop_everything():
    from mindspeed_cp import context_parallel_attention

    case = Case({}, seq_len=5)
    layout, inputs = case.layout(), case.inputs()
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value")]
    given = arguments(case, *setup_of(case.config), layout, None, None)
    out = context_parallel_attention(*leaves, **{**given, "dropout_p": 1.0, "kernel": Fused()})
    out.backward(inputs["grad_out"])
    assert not any(tensor.any() for tensor in (out, *(leaf.grad for leaf in leaves)))
