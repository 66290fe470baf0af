"""Hundreds of calls with growing lengths leave no memory, no descriptors and no threads behind."""

import gc
import os

import pairs
import pytest
from cases import Case, arguments, local_inputs
from distributed import run_ranks

pytestmark = pytest.mark.cpu_only
CALLS, LONGEST = 600 if pairs.whole() else 150, 300
CONFIGS = {
    "ring": {"context_parallel_size": 2, "algorithm": "megatron_cp_algo"},
    "ulysses": {"context_parallel_size": 2, "algorithm": "ulysses_cp_algo"},
}


def held():
    """(resident bytes, open descriptors, threads) of this process."""
    gc.collect()  # what earlier cases left in this rank
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def attend_once(rank, config, groups, seq_len):
    from mindspeed_cp import SequenceLayout, context_parallel_attention

    case = Case(config.__dict__, seq_len=seq_len, heads=4, kv_heads=4, dk=32, dv=32, dtype="float32")
    layout = SequenceLayout.build(config, seq_len)
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    context_parallel_attention(*leaves, **arguments(case, config, groups, layout, sinks, mask)).backward(grad_out)


def call_with_growing_lengths(rank, settings):
    """(held before, held after, bytes sent) of many calls; the longest was called before them."""
    from mindspeed_cp import ContextParallelConfig, ContextParallelGroups
    from mindspeed_cp.comm import count_bytes

    config = ContextParallelConfig(**settings)
    groups = ContextParallelGroups.build(config)
    for _ in range(20):
        attend_once(rank, config, groups, LONGEST)
    before = held()
    with count_bytes() as sent:
        for call in range(CALLS):
            attend_once(rank, config, groups, 2 * (1 + call * LONGEST // (2 * CALLS)))
    after = held()
    groups.destroy()
    return before, after, sent.total_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_calls_with_growing_lengths_leave_nothing_behind(name):
    for before, after, sent in run_ranks(2, call_with_growing_lengths, CONFIGS[name]):
        # Fewer is well: what made the groups may end after the first calls.
        assert all(now <= then for now, then in zip(after[1:], before[1:])), ("descriptors, threads", before, after)
        # A part of what was sent: were one message in CALLS / 30 kept, this would be red.
        assert after[0] - before[0] < 30 * sent / CALLS, (after[0] - before[0], sent)
