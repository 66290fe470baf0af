"""Several calls in flight: reused buffers must never hold what a later backward pass still needs."""

from dataclasses import replace

import pytest
import torch
from cases import Case, arguments, check_cases, expected, largest_errors, local_inputs, setup_of, whole
from distributed import run_ranks
from reference import allowed_pairs, attention, attention_with_gradients
from setups import ALGORITHM_AND_SIZE, shapes, variants
from torch.utils.checkpoint import checkpoint

from mindspeed_cp import DynamicGatherSizeCalculator, UlyssesContextAttention
from mindspeed_cp.sequence.runs import split_sizes

AT_FOUR = [point for point in ALGORITHM_AND_SIZE if point.values[1] in (3, 4)]
for_every_algorithm = pytest.mark.parametrize("algorithm, cp", AT_FOUR)


def prepared(rank, case):
    """(call, leaves, grad_out) of one attention."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config)
    layout = case.layout()
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    keywords = arguments(case, config, groups, layout, sinks, mask)
    return (lambda *tensors: context_parallel_attention(*tensors, **keywords)), leaves, grad_out


def results(out, leaves):
    return {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("qkv", leaves)}}


def forward_all_then_backward(rank, cases, order):
    """Forward of every case, then backward in the given order."""
    problems = [prepared(rank, case) for case in cases]
    outs = [call(*leaves) for call, leaves, _ in problems]
    for index in order:
        outs[index].backward(problems[index][2])
    return [results(out, leaves) for out, (_, leaves, _) in zip(outs, problems)]


def check(cases, shards, tolerance=1e-10):
    for index, case in enumerate(cases):
        errors = largest_errors(whole(case, [shard[index] for shard in shards]), expected(case))
        assert max(errors.values()) <= tolerance, (index, errors, repr(case))


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)], ids=["reverse", "any-order"])
@for_every_algorithm
def test_layers_in_flight_do_not_share_what_they_saved(algorithm, cp, order):
    """Three layers of different lengths and shapes, backward after all forwards, as in a model or a pipeline."""
    for config in variants(algorithm, cp):
        cases = [
            Case(config, seq_len=length, batch=batch, heads=8, kv_heads=kv_heads, seed=length)
            for length, batch, kv_heads in ((24, 1, 4), (31, 2, 8), (7, 1, 2))
        ]
        check(cases, run_ranks(cp, forward_all_then_backward, cases, order))


@for_every_algorithm
def test_low_precision_layers_in_flight_do_not_share_what_they_saved(algorithm, cp):
    """bfloat16 accumulates in reused memory, float64 does not."""
    for config in variants(algorithm, cp):
        cases = [
            Case(config, seq_len=length, heads=8, kv_heads=4, seed=length, dtype="bfloat16") for length in (24, 31)
        ]
        alone = [run_ranks(cp, forward_all_then_backward, [case], (0,)) for case in cases]
        together = run_ranks(cp, forward_all_then_backward, cases, (0, 1))
        for rank in range(cp):
            for index in range(2):
                for name, tensor in together[rank][index].items():
                    assert torch.equal(tensor, alone[index][rank][0][name]), (config, index, name)


def recomputed(rank, case):
    """The call under activation checkpointing: its forward runs again inside backward."""
    call, leaves, grad_out = prepared(rank, case)
    out = checkpoint(call, *leaves, use_reentrant=False)
    out.backward(grad_out)
    return [results(out, leaves)]


def backward_twice(rank, case):
    """The second backward pass of a retained graph must give the first's gradients again."""
    call, leaves, grad_out = prepared(rank, case)
    out = call(*leaves)
    out.backward(grad_out, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    out.backward(grad_out)
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(first, leaves))
    return [results(out, leaves)]


@pytest.mark.parametrize("function", [recomputed, backward_twice], ids=["recompute", "twice"])
@for_every_algorithm
def test_recomputing_and_repeating_backward_give_the_same_gradients(algorithm, cp, function):
    for config in variants(algorithm, cp):
        case = Case(config, seq_len=29, heads=8, kv_heads=4)
        check([case], run_ranks(cp, function, case))


def stacked(rank, case):
    """Two layers, the second's inputs made from the first's output."""
    call, leaves, grad_out = prepared(rank, case)
    first = call(*leaves)
    out = call(first, first * 0.5, leaves[2] + first)
    out.backward(grad_out)
    return [results(out, leaves)]


@for_every_algorithm
def test_gradients_flow_through_a_stack_of_two_layers(algorithm, cp):
    for config in variants(algorithm, cp):
        case = Case(config, seq_len=29, heads=8, kv_heads=8)
        inputs = case.inputs()
        leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value")]
        allowed = case.allowed(None)
        first = attention(*leaves, allowed)
        out = attention(first, first * 0.5, leaves[2] + first, allowed)
        want = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, inputs["grad_out"])), out=out.detach())
        got = whole(case, [shard[0] for shard in run_ranks(cp, stacked, case)])
        assert max(largest_errors(got, want).values()) <= 1e-10, config


def test_a_changing_length_and_algorithm_from_call_to_call_is_legal():
    """One process, one set of groups: every length from one token up, back and forth."""
    configs = [
        shape
        for name in ("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo")
        for shape in shapes(name, 4)
    ]
    check_cases(
        [
            Case(configs[n % len(configs)], seq_len=length, dtype="float64")
            for n, length in enumerate([40, 1, 33, 2, 64, 3, 17, 64, 5, 4])
        ]
    )


class Local(torch.nn.Module):
    """Causal dense attention of the heads it gets."""

    def forward(self, query, key, value):
        return attention(query, key, value, allowed_pairs(query.shape[0], causal=True))


def ulysses_module_with_changing_lengths(rank, lengths):
    """One module, a forward for every length, then all backward passes from the first to the last."""
    import torch.distributed as dist

    module = UlyssesContextAttention(Local(), dist.group.WORLD, gather_size_calculator=DynamicGatherSizeCalculator())
    runs = []
    for length in lengths:
        case = Case(
            {"context_parallel_size": dist.get_world_size()},
            seq_len=length,
            heads=5,
            kv_heads=5,
            seed=length,
            dtype="float64",
        )
        inputs, sizes = case.inputs(), split_sizes(length, dist.get_world_size())
        leaves = [inputs[name].split(sizes)[rank].clone().requires_grad_() for name in ("query", "key", "value")]
        runs.append((module(*leaves), leaves, inputs["grad_out"].split(sizes)[rank]))
    for out, _, grad_out in runs:
        out.backward(grad_out)
    return [results(out, leaves) for out, leaves, _ in runs]


@pytest.mark.parametrize("cp", [2, 3, 5])
def test_one_unaligned_module_serves_a_different_length_in_every_call(cp):
    lengths = [13, 29, 1, 8, 30, 2]
    shards = run_ranks(cp, ulysses_module_with_changing_lengths, lengths)
    for index, length in enumerate(lengths):
        case = Case({"context_parallel_size": cp}, seq_len=length, heads=5, kv_heads=5, seed=length, dtype="float64")
        inputs = case.inputs()
        want = attention_with_gradients(
            *(inputs[name] for name in ("query", "key", "value", "grad_out")), case.allowed(None)
        )
        got = {name: torch.cat([shard[index][name] for shard in shards]) for name in want}
        assert max(largest_errors(got, want).values()) <= 1e-10, length


def test_two_sets_of_groups_do_not_disturb_each_other():
    """Buffers belong to the groups: layers of different hierarchies may be in flight together."""
    base = Case(next(shapes("megatron_cp_algo", 4)), seq_len=24, dtype="float64")
    cases = [
        base,
        replace(base, config=next(shapes("hybrid_cp_algo", 4)), seed=1),
        replace(base, config=next(shapes("ulysses_cp_algo", 4)), seed=2),
    ]
    check(cases, run_ranks(4, forward_all_then_backward, cases, (0, 1, 2)))
