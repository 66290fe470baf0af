"""UlyssesContextAttention around an attention that exchanges itself, as Megatron's under the adaptor, and wrapped."""

from functools import partial

import pytest
import reference
import torch
from distributed import run_ranks
from torch.utils.checkpoint import checkpoint

from mindspeed_cp import (
    ContextParallelConfig,
    ContextParallelGroups,
    DefaultGatherSizeCalculator,
    DynamicGatherSizeCalculator,
    SequenceLayout,
    UlyssesContextAttention,
    context_parallel_attention,
)
from mindspeed_cp.attention.exchanged import exchange_around


def tensors(seq, heads, kv_heads):
    """query, key, value and the output's gradient of the whole sequence."""
    generator = torch.Generator().manual_seed(7)
    counts = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(seq, 2, count, 4, dtype=torch.float64, generator=generator) for count in counts]


class ContextParallelCore(torch.nn.Module):
    """What Megatron's core attention is under the adaptor: it exchanges, unless somebody around it has."""

    def __init__(self, config, groups, layout):
        super().__init__()
        self.config, self._call = config, (config, groups, layout)

    def forward(self, query, key, value):
        around, call = exchange_around(self), self._call
        if around is not None:
            call = around.alone(*call)
            assert around.local_length(len(query)) == self._call[2].length(around.rank)
        return context_parallel_attention(query, key, value, **dict(zip(("config", "groups", "layout"), call)))

    forward.exchanges_context_parallel = True


class Subclass(ContextParallelCore):
    def forward(self, query, key, value):
        return super().forward(query, key, value)


class Holder(torch.nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, query, key, value):
        return self.core(query, key, value)


WRAPPERS = {
    "the class itself": ContextParallelCore,
    "subclass": Subclass,
    "module": lambda *call: Holder(ContextParallelCore(*call)),
    "partial": lambda *call: partial(ContextParallelCore(*call)),
    "function": lambda *call: lambda *tensors: ContextParallelCore(*call)(*tensors),
    "checkpoint": lambda *call: partial(checkpoint, ContextParallelCore(*call), use_reentrant=False),
    "reentrant checkpoint": lambda *call: partial(checkpoint, ContextParallelCore(*call), use_reentrant=True),
}


def _wrapped(rank, algorithm, seq):
    """name of the wrapper -> largest error of out, dq, dk and dv."""
    config = ContextParallelConfig(context_parallel_size=2, algorithm=algorithm)
    groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, seq)
    whole = tensors(seq, 4, 2)
    expected = reference.attention_with_gradients(*whole, reference.allowed_pairs(seq, causal=True))
    errors = {}
    for name, wrapper in WRAPPERS.items():
        leaves = [layout.shard(tensor, rank).clone().requires_grad_() for tensor in whole[:3]]
        calculator = DefaultGatherSizeCalculator() if seq % 4 == 0 else DynamicGatherSizeCalculator()
        module = UlyssesContextAttention(wrapper(config, groups, layout), None, gather_size_calculator=calculator)
        out = module(*leaves)
        out.backward(layout.shard(whole[3], rank))
        found = (out.detach(), *(leaf.grad for leaf in leaves))
        errors[name] = max(
            float((got - layout.shard(want, rank)).abs().max()) for got, want in zip(found, expected.values())
        )
    return errors


@pytest.mark.parametrize("algorithm", ["ulysses_cp_algo", "megatron_cp_algo"])
@pytest.mark.parametrize("seq", [8, 13])
def test_a_wrapped_attention_that_exchanges_itself_is_exchanged_once(algorithm, seq):
    for errors in run_ranks(2, _wrapped, algorithm, seq):
        assert max(errors.values()) < 1e-10, errors


def _other_ranks(rank):
    config = ContextParallelConfig(context_parallel_size=2)
    groups = ContextParallelGroups.build(config, cp_ranks=[[0, 1], [2, 3]])
    core = Holder(ContextParallelCore(config, groups, SequenceLayout.build(config, 8)))
    tensor = torch.ones(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"exchanged over ranks \[0, 1, 2, 3\].*context-parallel over ranks"):
        UlyssesContextAttention(core, None)(tensor, tensor, tensor)
    with pytest.raises(ValueError, match="key has 3 tokens .* query 2: cross attention cannot go through"):
        longer = torch.ones(3, 1, 4, 4)
        UlyssesContextAttention(torch.nn.Identity(), None)(tensor, longer, longer)


def test_an_exchange_over_other_ranks_and_cross_attention_are_refused_by_name():
    run_ranks(4, _other_ranks)
