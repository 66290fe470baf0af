"""Shards that ranks of one host read where they lie: nothing is copied, and no place is used again while it is read."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from cases import Case, arguments, attend, local_inputs, setup_of
from distributed import run_ranks
from test_host_memory import linked

from mindspeed_cp import context_parallel_attention
from mindspeed_cp.comm.host_memory import LINE, UNREAD
from mindspeed_cp.comm.reading_in_place import Borrowed, _lend

pytestmark = pytest.mark.cpu_only
RING = {"algorithm": "megatron_cp_algo"}
EXCHANGES = {
    "ring": (4, RING),
    "double ring": (4, {**RING, "window_size": 2}),
    "direct": (3, {**RING, "kv_exchange": "direct"}),
    "direct in flight": (3, {**RING, "kv_exchange": "direct", "in_flight": 2}),
    "all-gather": (3, {"algorithm": "kvallgather_cp_algo"}),
}


def lent_twice(rank, size):
    """What rank 1 reads of two messages of rank 0 after both were lent, and the memory of rank 0 after a third."""
    link = linked()
    if rank == 0:
        for value in (1.0, 2.0):
            _lend(link, torch.full((size,), value), [1], "kv")
        dist.barrier()
        _lend(link, torch.full((size,), 3.0), [1], "kv")
        return link.carrier.num_bytes
    borrowed = [Borrowed.expect(link, 0, size, torch.float32, "kv") for _ in range(3)]
    first, second = (one.wait() for one in borrowed[:2])
    read = [*first.unique().tolist(), *second.unique().tolist()]
    borrowed[1].give_back()
    dist.barrier()
    return read + borrowed[2].wait().unique().tolist() + first.unique().tolist()


def test_a_place_is_used_again_when_it_was_given_back_and_not_before():
    size = 16 * LINE
    held, read = run_ranks(2, lent_twice, size, fresh=True)
    assert read == [1.0, 2.0, 3.0, 1.0] and held == 2 * (LINE + 4 * size)


def buffers(rank, case):
    """Names of this rank's buffers for keys and values on their way; how many of its messages were not given back."""
    _, groups = setup_of(case.config, case.share_from)
    groups.workspace.clear()
    attend(rank, case)
    dist.barrier()
    host = groups.cp.carrier
    left = (
        [parcel for parcel in host._unread if not all(map(host._own.words.__getitem__, parcel.marks))] if host else []
    )
    return {name for name, *_ in groups.workspace._buffers if name.startswith("kv")}, len(left)


@pytest.mark.parametrize("name", EXCHANGES)
def test_nothing_is_received_into_where_all_share_memory_and_all_is_given_back(name):
    size, config = EXCHANGES[name]
    case = Case({"context_parallel_size": size, **config}, seq_len=8 * size)
    assert run_ranks(size, buffers, case) == [(set(), 0)] * size
    gloo = run_ranks(size, buffers, Case({"context_parallel_size": size, **config}, seq_len=8 * size, share_from=None))
    assert all(names for names, _ in gloo), "gloo receives into buffers"


def without_room(rank, cases):
    """Results of attention of each case while rank 1 gets no more memory."""

    def refuse(*args):
        raise OSError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(os, "posix_fallocate", refuse)
        return [attend(rank, case) for case in cases]


def test_gloo_brings_a_shard_for_which_its_rank_has_no_room():
    cases = [
        Case({"context_parallel_size": 3, **config}, seq_len=24) for size, config in EXCHANGES.values() if size == 3
    ]
    cases += [Case({"context_parallel_size": 3, **RING}, seq_len=25, kv_heads=2)]
    alone = [Case(**{**vars(case), "share_from": None}) for case in cases]
    for got, wanted in zip(run_ranks(3, without_room, cases, fresh=True), run_ranks(3, without_room, alone)):
        for one, other in zip(got, wanted, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)


def ahead(rank, passes):
    """Shared memory of this rank after forward passes in which rank 1, which is slow, needs rows of rank 0 alone."""
    case = Case({"context_parallel_size": 2, **RING, "kv_exchange": "direct"}, runs=(((0, 12),), ((12, 24),)))
    config, groups = setup_of(case.config, case.share_from)
    layout = case.layout()
    leaves, sinks, _, mask = local_inputs(rank, case, layout)
    with torch.no_grad():
        for _ in range(passes):
            time.sleep(0.005 * rank)
            context_parallel_attention(*leaves, **arguments(case, config, groups, layout, sinks, mask))
    return groups.cp.carrier.num_bytes


def test_a_rank_that_needs_nothing_does_not_run_ahead_of_a_slow_one():
    one, many = (run_ranks(2, ahead, passes, fresh=True)[0] for passes in (1, 10 * UNREAD))
    assert 0 < one <= many <= UNREAD * one
