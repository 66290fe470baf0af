"""UlyssesContextAttention around local attention modules of several kinds, against dense attention in one process."""

import gc
import os
from types import SimpleNamespace

import pytest
import reference
import torch
from distributed import run_ranks

from mindspeed_cp import (
    DefaultGatherSizeCalculator,
    DynamicGatherSizeCalculator,
    GatherSizeCalculator,
    UlyssesContextAttention,
)
from mindspeed_cp.comm import count_bytes
from mindspeed_cp.compat.mapping import cal_split_sizes


class LocalAttention(torch.nn.Module):
    """Dense attention on (seq, batch, heads, dim); insists on what many modules do, view() of its inputs.

    Args:
        merged: return (seq, batch, heads * dim).
        order: the caller's dimensions for (seq, batch, heads, dim).
    """

    def __init__(self, merged=True, order=(0, 1, 2, 3)):
        super().__init__()
        self.merged, self.order = merged, order

    def forward(self, query, key, value, attention_mask=None):
        for tensor in (query, key, value):
            tensor.view(-1)
        query, key, value = (tensor.permute(self.order) for tensor in (query, key, value))
        self.seen = tuple(query.shape), tuple(key.shape)
        allowed = reference.allowed_pairs(query.shape[0], causal=attention_mask is None, attention_mask=attention_mask)
        out = reference.attention(query, key, value, allowed)
        out = out.permute([self.order.index(dim) for dim in range(4)])
        return out.flatten(-2) if self.merged else out


class ByKeyword(GatherSizeCalculator):
    """The calculator of the published sample code."""

    def calculate(self, *args, **kwargs):
        self.got = args, kwargs
        return kwargs.get("gather_size", None)


def _tensors(seq, heads, kv_heads, dv=6):
    generator = torch.Generator().manual_seed(7)
    make = lambda n, d: torch.randn(seq, 2, n, d, dtype=torch.float64, generator=generator)  # noqa: E731
    return make(heads, 4), make(kv_heads, 4), make(kv_heads, dv), make(heads, dv)


def _check(rank, seq, heads, kv_heads, order, merged, mask, calculator, kwargs):
    """order: the caller's dimensions in the order (seq, batch, heads, dim)."""
    world = torch.distributed.get_world_size()
    tensors = _tensors(seq, heads, kv_heads)
    expected = reference.attention_with_gradients(
        *tensors, reference.allowed_pairs(seq, causal=mask is None, attention_mask=mask)
    )
    outside = [order.index(dim) for dim in range(4)]

    def mine(tensor):
        own = tensor.split(cal_split_sizes(seq, world))[rank].permute(outside)
        return own.clone(memory_format=torch.contiguous_format)

    query, key, value = (mine(tensor).requires_grad_() for tensor in tensors[:3])
    local = LocalAttention(merged, order)
    module = UlyssesContextAttention(local, None, order[2], order[0], gather_size_calculator=calculator)
    out = module(query, key, value, *([] if mask is None else [mask]), **kwargs)
    grad_out = mine(tensors[3])
    out.backward(grad_out.flatten(-2) if merged else grad_out)
    wanted = mine(expected["out"])
    torch.testing.assert_close(out, wanted.flatten(-2) if merged else wanted, rtol=0, atol=1e-12)
    for tensor, name in ((query, "dq"), (key, "dk"), (value, "dv")):
        torch.testing.assert_close(tensor.grad, mine(expected[name]), rtol=0, atol=1e-12)
    assert local.seen[0][0] == seq and local.seen[0][2] == cal_split_sizes(heads, world)[rank]
    return local.seen


SBHD, BSHD, BHSD, SHBD = (0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3)


def _aligned(rank):
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    for order in (SBHD, BSHD, BHSD, SHBD):
        for merged in (False, True) if order in (SBHD, BSHD) else (False,):
            for kv_heads in (6, 3, 2, 1):
                _check(rank, 12, 6, kv_heads, order, merged, None, "default", {})
        _check(rank, 12, 6, 2, order, False, mask, DefaultGatherSizeCalculator(), {})


@pytest.mark.parametrize("world", [1, 2, 3])
def test_aligned_attention_matches_dense_in_every_order_of_dimensions(world):
    run_ranks(world, _aligned)


def _unaligned(rank):
    for seq in (1, 2, 5, 13):
        mask = ~torch.tril(torch.ones(seq, seq, dtype=torch.bool))
        for heads, kv_heads in ((6, 2), (7, 7), (5, 1), (10, 5)):
            _check(rank, seq, heads, kv_heads, SBHD, True, mask, "dynamic", {})
            _check(rank, seq, heads, kv_heads, BSHD, False, None, DynamicGatherSizeCalculator(), {})
            _check(rank, seq, heads, kv_heads, SBHD, seq % 2 == 1, None, ByKeyword(), {"gather_size": seq})


@pytest.mark.parametrize("world", [2, 3, 4])
def test_unaligned_lengths_and_uneven_heads_match_dense(world):
    run_ranks(world, _unaligned)


def _minimal_replication(rank):
    with count_bytes() as traffic:
        seen = _check(rank, 8, 8, 2, SBHD, True, None, DefaultGatherSizeCalculator(), {})
    assert seen[1][2] == 1  # one of lcm(2, 4) = 4 KV heads, not one of 8
    sent = 3 * 2 * 2 * 8  # to 3 ranks, 2 tokens, batch 2, 8 bytes
    assert traffic["q"] == sent * 2 * 4 and traffic["kv"] == sent * (4 + 6) and traffic["out"] == sent * 2 * 6
    assert traffic.messages == {"q": 1, "kv": 0, "out": 1, "dout": 1, "dq": 1, "dkv": 0}


def test_kv_heads_are_replicated_minimally_and_travel_with_the_query():
    run_ranks(4, _minimal_replication)


def _merged_inputs(rank):
    """(seq, batch, heads * dim) in and out, and (seq, heads, dim)."""
    world = torch.distributed.get_world_size()
    query, key, value, grad = _tensors(6, 4, 4)
    allowed = reference.allowed_pairs(6, causal=True)
    expected = reference.attention_with_gradients(query, key, value, grad, allowed)

    def merged(query, key, value):
        split = (tensor.unflatten(-1, (4 // world, -1)) for tensor in (query, key, value))
        return reference.attention(*split, allowed).flatten(2)

    def without_batch(query, key, value):
        return reference.attention(*(tensor.unsqueeze(1) for tensor in (query, key, value)), allowed).squeeze(1)

    for function, scatter, view in ((merged, 2, lambda t: t.flatten(2)), (without_batch, 1, lambda t: t[:, 0])):
        locals_ = [view(tensor).chunk(world)[rank].clone().requires_grad_() for tensor in (query, key, value)]
        out = UlyssesContextAttention(function, None, scatter_idx=scatter)(*locals_)
        torch.testing.assert_close(out, view(expected["out"]).chunk(world)[rank], rtol=0, atol=1e-12)
        out.backward(view(grad).chunk(world)[rank])
        for tensor, name in zip(locals_, ("dq", "dk", "dv"), strict=True):
            torch.testing.assert_close(tensor.grad, view(expected[name]).chunk(world)[rank], rtol=0, atol=1e-12)


def test_three_dimensional_tensors_work_with_and_without_merged_heads():
    run_ranks(2, _merged_inputs)


class TakesAnything(torch.nn.Module):
    def forward(self, query, key, value, *args, **kwargs):
        self.got = args, kwargs
        return query


def _arguments(rank):
    query = torch.zeros(3, 1, 4, 2)
    calculator, local = ByKeyword(), TakesAnything()
    module = UlyssesContextAttention(local, None, gather_size_calculator=calculator)
    module(query, query, query, "mask", gather_size=6, extra=1)
    assert calculator.got == (("mask",), {"gather_size": 6, "extra": 1}) == local.got
    strict = LocalAttention()
    UlyssesContextAttention(strict, None, gather_size_calculator=calculator)(query, query, query, gather_size=6)
    with pytest.raises(TypeError, match="gather_size"):
        UlyssesContextAttention(strict, None)(query, query, query, gather_size=6)


def test_calculators_see_all_arguments_and_local_attention_what_it_takes():
    run_ranks(2, _arguments)


def _messages(rank):
    def attend(seq, heads=4, kv_heads=4, calculator=None, seq_local=None, **kwargs):
        seq_local = cal_split_sizes(seq, 2)[rank] if seq_local is None else seq_local
        key = torch.zeros(seq_local, 1, kv_heads, 2)
        calculator = calculator or DefaultGatherSizeCalculator()
        return UlyssesContextAttention(LocalAttention(), None, gather_size_calculator=calculator)(
            torch.zeros(seq_local, 1, heads, 2), key, key, **kwargs
        )

    class Disagrees(GatherSizeCalculator):
        def calculate(self):
            return 6 + rank

    for call, words in (
        (lambda: attend(5), r"hold \[3, 2\]; pass gather_size_calculator=DynamicGatherSizeCalculator"),
        (lambda: attend(5, calculator=ByKeyword(), gather_size=7), r"return 5"),
        (
            lambda: attend(5, calculator=DynamicGatherSizeCalculator(), seq_local=2 + rank),
            r"must be split as \[3, "
            r"2\]",
        ),
        (lambda: attend(6, calculator=Disagrees()), r"different lengths \[6, 7\]"),
        (lambda: attend(4, heads=1, kv_heads=1), "1 heads cannot give each of 2 ranks one"),
        (lambda: attend(4, heads=4, kv_heads=3), "divide the first"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_impossible_splits_raise_on_every_rank_with_a_way_out():
    run_ranks(2, _messages)


def test_dynamic_calculator_reads_the_mask_wherever_it_is():
    calculator, mask = DynamicGatherSizeCalculator(), torch.zeros(1, 1, 7, 9)
    assert calculator.calculate(mask) == calculator.calculate(attention_mask=mask) == 9
    assert calculator.calculate(None, attn_mask=mask) == 9
    assert calculator.calculate() is None and calculator.calculate([mask]) is None
    assert DefaultGatherSizeCalculator().calculate(mask) is None


def _traffic_of_calls(rank):
    """Messages by purpose of a first and of a second call, aligned and with a gather size."""
    found = []
    for calculator, kwargs in ((DefaultGatherSizeCalculator(), {}), (ByKeyword(), {"gather_size": 6})):
        module = UlyssesContextAttention(LocalAttention(), None, gather_size_calculator=calculator)
        for _ in range(2):
            query = torch.zeros(3, 1, 4, 2)
            with count_bytes() as traffic:
                module(query, query, query, **kwargs)
            found.append(dict(traffic.messages))
    return found


def test_lengths_cost_no_message_of_their_own():
    assert run_ranks(2, _traffic_of_calls) == [[{"q": 1, "kv": 0, "out": 1}] * 4] * 2


def _one_rank_changes(rank):
    """The errors when rank 1 alone has another length, or gather size, than in the calls before; then all is well."""

    def attend(length, **kwargs):
        calculator = ByKeyword() if kwargs else DefaultGatherSizeCalculator()
        query = torch.ones(length, 1, 4, 64)
        module = UlyssesContextAttention(LocalAttention(), None, gather_size_calculator=calculator)
        return module(query, query, query, **kwargs).shape[0]

    errors = []
    assert attend(4) == 4 and attend(4) == 4 and attend(4, gather_size=8) == 4
    for call in (lambda: attend(4 + rank), lambda: attend(4 - 3 * rank), lambda: attend(4, gather_size=8 + rank)):
        with pytest.raises(ValueError) as error:
            call()
        errors.append(str(error.value))
        assert attend(4) == 4
    return errors


def test_a_length_that_one_rank_changes_is_an_error_on_every_rank_and_no_hang():
    for longer, shorter, size in run_ranks(2, _one_rank_changes, timeout=30):
        assert "they hold [4, 5]" in longer and "they hold [4, 1]" in shorter
        assert "different lengths [8, 9]" in size


def _lengths_that_are_summed(rank):
    """Rank 0 keeps its length while the sum changes: 5 + 4, then 5 + 5 tokens."""
    module = UlyssesContextAttention(LocalAttention(), None, gather_size_calculator=DynamicGatherSizeCalculator())
    for length in ((5, 4), (5, 5), (5, 4)):
        query = torch.zeros(length[rank], 1, 4, 2)
        module(query, query, query)
        assert module.local_attn.seen[0][0] == sum(length)


def test_a_sum_of_lengths_may_change_while_a_ranks_own_stays():
    run_ranks(2, _lengths_that_are_summed, timeout=30)


def _memory_files():
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("/memfd:mindspeed_cp") for link in links if os.path.islink(link))


def _module_and_group_go(rank):
    """Shared memory while a module and its group live, and after both are gone, without garbage collection."""
    before = _memory_files()
    group = torch.distributed.new_group([0, 1])
    module = UlyssesContextAttention(LocalAttention(), group)
    query = torch.ones(64, 1, 4, 64)
    module(query, query, query)
    during = _memory_files() - before
    torch.distributed.barrier()
    torch.distributed.destroy_process_group(group)
    gc.disable()
    try:
        del module, group
        return during, _memory_files() - before
    finally:
        gc.enable()


def _group_went(rank):
    group = torch.distributed.new_group([0, 1])
    module = UlyssesContextAttention(LocalAttention(), group)
    query = torch.ones(8, 1, 4, 8)
    module(query, query, query)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group(group)
    with pytest.raises(ValueError, match="the process group was destroyed.*build the module with a group that exists"):
        module(query, query, query)


@pytest.mark.cpu_only
def test_a_module_whose_group_was_destroyed_says_so():
    run_ranks(2, _group_went)


@pytest.mark.cpu_only
def test_shared_memory_goes_with_the_module_and_its_group():
    for during, after in run_ranks(2, _module_and_group_go):
        assert during > 0 and after == 0


class ExchangesItself(torch.nn.Module):
    """Like Megatron's core attention under the adaptor: it takes this rank's tokens and attends over all."""

    def __init__(self, context_parallel_size):
        super().__init__()
        self.config = SimpleNamespace(context_parallel_size=context_parallel_size)

    def forward(self, query, key, value):
        return query

    forward.exchanges_context_parallel = True


def _passed_through(rank):
    query = torch.ones(3, 1, 4, 2)
    seen = []
    for size in (2, 1):
        with count_bytes() as traffic:
            out = UlyssesContextAttention(ExchangesItself(size), None)(query, query, query)
        assert torch.equal(out, query)
        seen.append(traffic.total_messages)
    return seen


def test_a_local_attention_that_exchanges_itself_is_not_exchanged_around():
    assert run_ranks(2, _passed_through) == [[0, 2]] * 2
