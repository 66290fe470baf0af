"""Inputs and modes that a caller may bring without thinking of them: strides, grad modes, autocast, inference."""

import dataclasses

import pytest
import torch

from mindspeed_cp import (
    ContextParallelConfig,
    ContextParallelGroups,
    SequenceLayout,
    TrainingSetup,
    context_parallel_attention,
    resolve,
)

SEQ, HEADS, DIM = 16, 4, 8


@pytest.fixture
def attend():
    """Attention on one rank with its own buffers."""
    config = ContextParallelConfig()
    groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, SEQ)

    def call(query, key, value, layout=layout, **options):
        return context_parallel_attention(query, key, value, config=config, groups=groups, layout=layout, **options)

    return call


def inputs(dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(SEQ, 1, HEADS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(**options)
        for _ in range(3)
    ]


@pytest.mark.parametrize("strided", range(3))
def test_a_last_dimension_with_gaps_gives_the_same_numbers(attend, strided):
    tensors = inputs()
    expected = attend(*tensors)
    with_gaps = list(tensors)
    with_gaps[strided] = tensors[strided].transpose(0, 3).contiguous().transpose(0, 3)
    assert with_gaps[strided].stride(-1) != 1
    torch.testing.assert_close(attend(*with_gaps), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["cpu", "blockwise"])
def test_a_second_derivative_is_refused_and_not_wrong(attend, kernel):
    tensors = inputs()
    (grad,) = torch.autograd.grad(attend(*tensors, kernel=kernel).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_autocast_does_not_round_what_is_summed_in_float32(attend):
    tensors = inputs(torch.float32)
    expected = attend(*tensors, kernel="blockwise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*tensors, kernel="blockwise")
    assert torch.equal(out, expected)


def test_buffers_made_during_inference_serve_training(attend):
    documents = dict(cu_seqlens=(0, 5, SEQ), sliding_window=(3, 0))
    with torch.inference_mode():
        attend(*inputs(torch.bfloat16, requires_grad=False), **documents)
    tensors = inputs(torch.bfloat16)
    attend(*tensors, **documents).float().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)


def test_an_order_read_during_inference_serves_training(attend):
    layout = SequenceLayout.from_runs(ContextParallelConfig(), [[(SEQ - 3, SEQ), (0, SEQ - 3)]])
    with torch.inference_mode():
        attend(*inputs(requires_grad=False), layout=layout)
    tensors = inputs()
    attend(*tensors, layout=layout).sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)


def test_hybrid_takes_uneven_heads_with_a_calculator():
    config = ContextParallelConfig(context_parallel_size=4, algorithm="hybrid_cp_algo", ulysses_degree=2)
    setup = TrainingSetup(num_attention_heads=5, seq_length=64)
    with pytest.raises(ValueError, match="--gather-size-calculator dynamic"):
        resolve(config, setup)
    assert resolve(config, dataclasses.replace(setup, gather_size_calculator="dynamic")).unaligned


def test_no_message_offers_the_calculator_that_had_to_be_dropped():
    config = ContextParallelConfig(context_parallel_size=4, kv_cache_policy="full")
    setup = TrainingSetup(num_attention_heads=6, seq_length=64, gather_size_calculator="dynamic")
    with pytest.raises(ValueError) as caught:
        resolve(config, setup)
    assert "or --gather-size-calculator dynamic" not in str(caught.value)
