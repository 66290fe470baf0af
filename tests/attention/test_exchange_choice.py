"""What "auto" of the exchange and of the steps in flight is, by how ring ranks are linked."""

from dataclasses import replace

import pytest
from distributed import run_ranks

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout
from mindspeed_cp.attention.exchange_choice import exchange_for, steps_in_flight
from mindspeed_cp.sequence.masks import attention_masks

AUTO = dict(context_parallel_size=8, algorithm="megatron_cp_algo", kv_exchange="auto", in_flight="auto")


def chosen(topology, dense=False, causal=True, **settings):
    config = ContextParallelConfig(**{**AUTO, **settings, "attention_mask_type": "causal" if causal else "full"})
    groups = ContextParallelGroups(config.hierarchy, 0, tuple(range(8)), topology=topology)
    layout = SequenceLayout.build(config, 64)
    exchange = exchange_for(config, groups, layout, attention_masks(causal, 64), dense)
    return exchange, steps_in_flight(config, exchange, topology)


@pytest.mark.parametrize(
    "topology, options, want",
    [
        ("mesh", {}, ("mesh", 1)),
        ("mesh", {"dense": True}, ("mesh", 1)),
        ("mesh", {"kv_exchange": "direct"}, ("direct", 7)),
        ("mesh", {"kv_exchange": "ring", "window_size": 4}, ("ring", 3)),
        ("mesh", {"window_size": 4}, ("ring", 3)),
        ("mesh", {"kv_exchange": "ring"}, ("ring", 1)),
        ("mesh", {"algorithm": "kvallgather_cp_algo"}, ("allgather", 1)),
        ("mesh", {"kv_exchange": "direct", "in_flight": 2}, ("direct", 2)),
        ("switch", {}, ("direct", 1)),
        ("switch", {"causal": False}, ("ring", 1)),
        ("switch", {"dense": True}, ("ring", 1)),
        ("nodes", {}, ("direct", 2)),
    ],
    ids=str,
)
def test_auto_goes_by_the_links(topology, options, want):
    assert chosen(topology, **options) == want


def topologies(rank):
    config = ContextParallelConfig(**{**AUTO, "context_parallel_size": 2})
    found = []
    for each in (config, replace(config, topology="mesh"), replace(config, kv_exchange="ring", in_flight=1)):
        groups = ContextParallelGroups.build(each)
        found.append(groups.topology)
        groups.destroy()
    return found


@pytest.mark.cpu_only
def test_ranks_of_one_host_find_a_switch_unless_they_are_told_of_a_mesh():
    assert run_ranks(2, topologies) == [["switch", "mesh", "switch"]] * 2
