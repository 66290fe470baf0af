"""A profile has ranges for what is posted, awaited and computed; without a profiler there are none."""

from collections import Counter

import pytest
import torch
from distributed import run_ranks
from torch.profiler import profile

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention
from mindspeed_cp.comm.meter import named

ALGORITHMS = {"megatron_cp_algo": "kv", "ulysses_cp_algo": "q", "kvallgather_cp_algo": "kv"}  # what is posted first


@pytest.fixture(scope="module")
def ranges():
    return run_ranks(2, _ranges)[0]


def _ranges(rank):
    found = {}
    for algorithm in ALGORITHMS:
        config = ContextParallelConfig(context_parallel_size=2, algorithm=algorithm)
        groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, 16)
        tensors = [torch.randn(8, 1, 2, 4, requires_grad=True) for _ in range(3)]
        with profile() as profiled:
            out = context_parallel_attention(*tensors, config=config, groups=groups, layout=layout)
            out.sum().backward()
        names = Counter(event.name for event in profiled.events())
        found[algorithm] = {name: n for name, n in names.items() if name.startswith("context parallelism: ")}
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_profile_says_what_is_posted_awaited_and_computed(ranges, algorithm):
    names = {name.removeprefix("context parallelism: ") for name in ranges[algorithm]}
    assert {"wait", "block forward", "block backward"} <= names
    assert any(name.startswith("post ") for name in names), names


def test_every_block_has_a_range_of_its_own(ranges):
    ring = ranges["megatron_cp_algo"]
    # Of the zigzag a rank has its own part, and the other rank's as one rectangle.
    assert ring["context parallelism: block forward"] == ring["context parallelism: block backward"] == 2


def test_without_a_profiler_nothing_is_named():
    assert named("wait") is named("block forward")
    with profile():
        assert named("wait") is not named("wait")
