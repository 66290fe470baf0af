"""Shared memory where files, memory or the right to them run out: gloo carries the messages, and nothing stays open."""

import os
import resource
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_host_memory import linked, swapped

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups

pytestmark = pytest.mark.cpu_only


def without_resources(rank, sizes):
    """Messages when nothing can be opened, made or enlarged any more since the groups exist."""
    link = linked()
    limits = {name: resource.getrlimit(name) for name in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)}
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[resource.RLIMIT_NOFILE][1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[resource.RLIMIT_FSIZE][1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "memfd_create")
            return all(swapped(rank, link, sizes)), link.carrier.num_bytes >= max(sizes)
    finally:
        for name, limit in limits.items():
            resource.setrlimit(name, limit)


def test_messages_grow_when_no_file_can_be_opened_or_enlarged_any_more():
    assert run_ranks(2, without_resources, [10, 100_000, 300_000], fresh=True) == [(True, True)] * 2


def without_room(rank, ranks):
    """Messages, both ways at once, when these ranks get no more memory; the warnings that this rank gave."""
    link = linked()

    def refuse(*args):
        raise OSError("no memory")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        if rank in ranks:
            patch.setattr(os, "posix_fallocate", refuse)
        right = all(swapped(rank, link, [1000, 10, 50_000]))
        gathered = link.gather(torch.full((1000,), float(rank)), [1000] * 2, "kv").wait()
    right &= [shard.unique().tolist() for shard in gathered] == [[0.0], [1.0]]
    return right, link.carrier.num_bytes > 0, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
def test_gloo_carries_what_shared_memory_has_no_room_for_and_that_is_said_once(ranks):
    for rank, (right, held, said) in enumerate(run_ranks(2, without_room, ranks, fresh=True)):
        assert right and held == (rank not in ranks)
        assert len(said) == (rank in ranks) and all("gloo carries" in text for text in said)


def refused_at_the_start(rank, limit):
    """Whether the ranks share memory, and the warnings, when rank 1 cannot map what the others have made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        if rank == 1:
            resource.setrlimit(getattr(resource, limit), (64 if limit == "RLIMIT_NOFILE" else 1 << 33,) * 2)
            held = [os.open("/dev/null", os.O_RDONLY) for _ in range(limit == "RLIMIT_NOFILE" and _free_files())]
        link = linked()
        if rank == 1:
            for file in held:
                os.close(file)
    right = all(swapped(rank, link, [1000])) if rank < 2 else True
    return sorted(link.carrier.peers) if link.carrier else None, right, [str(warning.message) for warning in caught]


def _free_files():
    """How many files may still be opened but one."""
    used = len(os.listdir("/proc/self/fd")) - 1
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - used - 1


@pytest.mark.parametrize("limit", ["RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_FSIZE"])
def test_a_rank_without_the_resources_for_it_is_left_out_by_all_and_that_is_said_once(limit):
    outcomes = run_ranks(3, refused_at_the_start, limit, fresh=True)
    assert [peers for peers, *_ in outcomes] == [[2], None, [0]]
    assert all(right for _, right, _ in outcomes)
    (said,) = (text for *_, texts in outcomes for text in texts)
    assert "global ranks [1] cannot share memory" in said


def open_files(rank):
    """Open files before a group, with it, and after it was destroyed."""
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    warm = ContextParallelGroups.build(config, share_from=None)

    def opened():
        return {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}

    def ours():
        return {name for name in opened() if "memfd:mindspeed_cp" in name} | (opened() & pipes)

    pipes = set()
    before = ours()
    groups = ContextParallelGroups.build(config, share_from=0)
    sent, received = torch.ones(100), torch.empty(100)
    groups.ring.exchange([(1 - rank, [sent])], [(1 - rank, [received])], "kv").wait()
    notices = groups.cp.carrier.notices
    pipes |= {os.path.realpath(f"/proc/self/fd/{file}") for file in (notices._from[1 - rank], notices._to[1 - rank])}
    during = ours()
    dist.barrier()
    groups.destroy()
    warm.destroy()
    return len(during - before), ours() - before


def test_nothing_stays_open_after_the_groups():
    assert run_ranks(2, open_files) == [(4, set())] * 2  # two memories and two pipes
