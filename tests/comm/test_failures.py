"""Invariant 8: nothing hangs. A rank that dies or stops makes the others fail, in time, with an error that names it."""

import os
from datetime import timedelta

import pytest
import torch
from cases import Case, arguments, expected, local_inputs
from distributed import RankFailure, observe_ranks, run_ranks

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionKernel

pytestmark = pytest.mark.cpu_only
VICTIM = 1
TIMEOUT = 4  # seconds of the process groups

CONFIGS = {
    "ulysses": {"algorithm": "ulysses_cp_algo"},
    "ring": {"algorithm": "megatron_cp_algo"},
    "ring-overlap": {"algorithm": "megatron_cp_algo", "send_recv_overlap": True},
    "direct": {"algorithm": "megatron_cp_algo", "kv_exchange": "direct"},
    "double-ring": {"algorithm": "megatron_cp_algo", "window_size": 2},
    "hybrid": {"algorithm": "hybrid_cp_algo", "ulysses_degree": 2},
    "allgather": {"algorithm": "kvallgather_cp_algo"},
}


class FailingKernel(AttentionKernel):
    """The CPU kernel until ``fail`` is called, in the named pass."""

    def __init__(self, failing_pass, fail):
        self._kernel, self._failing_pass, self._fail = select_kernel("cpu"), failing_pass, fail
        self.name, self.native_bands = "failing", self._kernel.native_bands

    def forward(self, *args):
        if self._failing_pass == "forward":
            self._fail()
        return self._kernel.forward(*args)

    def backward(self, *args):
        if self._failing_pass == "backward":
            self._fail()
        return self._kernel.backward(*args)


def die():
    os._exit(9)


def stop():
    raise MemoryError("this rank has a problem of its own")


def attend_until_failure(rank, case, failing_pass, fail):
    """Two layers of attention; the victim fails in its first kernel call of the named pass."""
    config = ContextParallelConfig(**case.config)
    groups = ContextParallelGroups.build(config, timeout=timedelta(seconds=TIMEOUT), share_from=case.share_from)
    layout = SequenceLayout.build(config, case.seq_len)
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    keywords = arguments(case, config, groups, layout, sinks, mask)
    if rank == VICTIM:
        keywords["kernel"] = FailingKernel(failing_pass, fail)
    for _ in range(2):
        context_parallel_attention(*leaves, **keywords).backward(grad_out)


def observed(name, failing_pass, fail, leave_after_failure=True, share_from=0):
    config = {"context_parallel_size": 4, "attention_mask_type": "full", **CONFIGS[name]}
    case = Case(config, seq_len=16, share_from=share_from)
    return observe_ranks(
        4,
        attend_until_failure,
        case,
        failing_pass,
        fail,
        timeout=10 * TIMEOUT,
        group_timeout=TIMEOUT,
        leave_after_failure=leave_after_failure,
    )


def check_survivors(outcomes):
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != VICTIM]
    assert [outcome.kind for outcome in survivors] == ["raised"] * 3, outcomes
    assert any(
        f"lost rank {VICTIM}" in outcome.detail or f", {VICTIM}," in outcome.detail.split("lost rank")[-1]
        for outcome in survivors
    ), survivors
    for outcome in survivors:
        assert "context parallelism: global rank" in outcome.detail, outcome.detail
        # A rank waits for its neighbour, the neighbour for the victim: a few timeouts one after the other at most.
        assert outcome.seconds < 5 * TIMEOUT


@pytest.mark.parametrize("failing_pass", ["forward", "backward"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_that_dies_makes_the_others_fail_and_is_named(name, failing_pass):
    outcomes = observed(name, failing_pass, die)
    assert outcomes[VICTIM].kind == "died" and "9" in outcomes[VICTIM].detail
    check_survivors(outcomes)


@pytest.mark.parametrize("name", ["ulysses", "ring", "allgather"])
def test_a_rank_that_dies_while_gloo_carries_everything_is_named_too(name):
    check_survivors(observed(name, "forward", die, share_from=None))


@pytest.mark.parametrize("name, share_from", [("ulysses", 0), ("ring-overlap", 0), ("direct", 0), ("ring", None)])
def test_a_rank_that_stops_without_leaving_makes_the_others_fail_within_the_timeout(name, share_from):
    outcomes = observed(name, "forward", stop, leave_after_failure=False, share_from=share_from)
    assert outcomes[VICTIM].kind == "raised" and "a problem of its own" in outcomes[VICTIM].detail
    check_survivors(outcomes)


def interrupted(rank, config, failing_pass):
    """(what the pass after an error in the middle of a pass says, gradients of a pass over new groups)."""
    share_from = 0 if failing_pass == "forward" else None
    case = Case({"context_parallel_size": 4, **config}, seq_len=16, share_from=share_from)
    config, layout = ContextParallelConfig(**case.config), case.layout()
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)

    def attend(groups, kernel=None):
        keywords = arguments(case, config, groups, layout, sinks, mask) | {"kernel": kernel}
        context_parallel_attention(*leaves, **keywords).backward(grad_out)

    groups, again = (ContextParallelGroups.build(config, share_from=share_from) for _ in range(2))
    with pytest.raises(MemoryError):
        attend(groups, FailingKernel(failing_pass, stop))
    with pytest.raises(RuntimeError) as refused:
        attend(groups)
    attend(again)
    return str(refused.value), [leaf.grad for leaf in leaves]


def interrupted_all(rank, configs):
    return {name: interrupted(rank, *each) for name, each in configs.items()}


def test_groups_of_an_interrupted_pass_refuse_the_next_and_new_ones_are_exact():
    direct = {**CONFIGS["direct"], "in_flight": 3}
    configs = {name: (config, "forward") for name, config in CONFIGS.items()}
    configs |= {f"direct in flight, {where}": (direct, where) for where in ("forward", "backward")}
    found = run_ranks(4, interrupted_all, configs, fresh=True)
    for name, (config, _) in configs.items():
        case = Case({"context_parallel_size": 4, **config}, seq_len=16)
        wanted = expected(case)
        for rank, (refused, _) in enumerate(each[name] for each in found):
            assert f"global rank {rank} (MemoryError: this rank has a problem of its own)" in refused
            assert "ContextParallelGroups.build" in refused
        for index, gradient in enumerate(("dq", "dk", "dv")):
            got = case.layout().unshard([each[name][1][index] for each in found])
            assert (got - wanted[gradient]).abs().max() < 1e-10, (name, gradient)


def sum_of_ranks(rank):
    total = torch.tensor(float(rank))
    torch.distributed.all_reduce(total)
    return float(total)


def one_rank_raises(rank):
    if rank == VICTIM:
        raise KeyError("only here")
    return sum_of_ranks(rank)


def one_rank_dies(rank):
    if rank == VICTIM:
        os._exit(5)
    return sum_of_ranks(rank)


def one_rank_sleeps(rank):
    if rank == VICTIM:
        import time

        time.sleep(600)
    return rank


def test_the_harness_shows_a_failing_ranks_traceback_and_serves_the_next_call():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 raised.*KeyError: 'only here'"):
        run_ranks(2, one_rank_raises)
    assert run_ranks(2, sum_of_ranks) == [1.0, 1.0]


def test_the_harness_notices_a_dead_rank():
    with pytest.raises(RankFailure, match="rank 1 of 3 died.*\nexit code 5"):
        run_ranks(3, one_rank_dies)
    assert run_ranks(3, sum_of_ranks) == [3.0, 3.0, 3.0]


def test_the_harness_ends_a_rank_that_does_not_answer_and_shows_where_it_was():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 hung.*one_rank_sleeps"):
        run_ranks(2, one_rank_sleeps, timeout=2)
    assert run_ranks(2, sum_of_ranks) == [1.0, 1.0]
