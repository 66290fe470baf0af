"""Notices between ranks of one host: in their order, by stream, more than a pipe holds, and from those that live."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from distributed import run_ranks

from mindspeed_cp.comm.host_memory import HostMemory
from mindspeed_cp.comm.notices import NUMBERS, stream_of

pytestmark = pytest.mark.cpu_only
A_PIPE_HOLDS = 1 << 16  # bytes, by default
_hosts = []


def numbers(first):
    return tuple(range(first, first + NUMBERS))


def pipes(seconds=30.0):
    """Those of a group of its own, which live as long as the process."""
    _hosts.append(HostMemory.connect(dist.new_group(timeout=timedelta(seconds=seconds)), 1))
    return _hosts[-1].notices


def of_several_streams(rank):
    """What is heard of two streams where they are heard in another order than they were told in.

    The time limit is ms-swift's, 208 days, which is longer than one poll may wait.
    """
    told, peer = pipes(18e6), 1 - rank
    if rank:
        time.sleep(0.2)  # the other rank has to wait
    for index in range(4):
        told.tell(peer, index % 2, numbers(10 * index))
    expected = [told.expect(peer, stream) for stream in (1, 0, 0, 1)]
    for notice in reversed(expected):
        notice.wait()
    return [notice.numbers[0] for notice in expected]


def test_notices_of_a_stream_come_in_their_order_whatever_others_are_heard_meanwhile():
    assert run_ranks(2, of_several_streams, fresh=True) == [[10, 0, 20, 30]] * 2


def more_than_a_pipe_holds(rank, count):
    """All ranks tell all others before anybody hears; how many came in their order."""
    told, peers = pipes(), [peer for peer in range(3) if peer != rank]
    for index in range(count):
        for peer in peers:
            told.tell(peer, 0, numbers(index))
    right = 0
    for index in range(count):
        for peer in peers:
            notice = told.expect(peer, 0)
            notice.wait()
            right += notice.numbers == numbers(index)
    return right


def test_ranks_may_tell_each_other_more_than_their_pipes_hold():
    count = 2 * A_PIPE_HOLDS // (8 * (NUMBERS + 1))
    assert run_ranks(3, more_than_a_pipe_holds, count, fresh=True) == [2 * count] * 3


def from_one_that_leaves(rank):
    """Rank 1 tells once and closes its side; rank 0 hears that, and learns at once that there is no more."""
    told = pipes(60.0)
    if rank == 1:
        told.tell(0, 0, numbers(7))
        told.close()
    else:
        first, second = (told.expect(1, 0) for _ in range(2))
        first.wait()
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="has ended, or has closed its groups"):
            second.wait()
        with pytest.raises(OSError):
            told.tell(1, 0, numbers(0))
        assert time.monotonic() - started < 20 and first.numbers == numbers(7)
    dist.barrier()


def test_a_peer_that_closed_its_groups_is_noticed_once_all_it_told_is_heard():
    run_ranks(2, from_one_that_leaves, fresh=True)


def in_vain(rank):
    """How long a rank waits for a notice that nobody tells, and for one that nobody takes."""
    told, seconds = pipes(0.5), []
    if rank == 0:
        for wait in (told.expect(1, 0).wait, lambda: [told.tell(1, 0, numbers(0)) for _ in range(A_PIPE_HOLDS)]):
            started = time.monotonic()
            with pytest.raises(RuntimeError, match=r"in 0\.5 s"):
                wait()
            seconds.append(time.monotonic() - started)
    dist.barrier()
    return seconds


def test_nobody_waits_for_a_notice_longer_than_the_groups_time_limit():
    waited, _ = run_ranks(2, in_vain, fresh=True)
    assert all(0.4 < seconds < 10 for seconds in waited)


def streams(rank):
    groups = [dist.group.WORLD, dist.new_group([0, 1])]
    return [stream_of(group, tag) for group in groups for tag in (0, 1)]


def test_streams_differ_by_group_and_tag_and_are_the_same_on_all_ranks():
    one, other = run_ranks(2, streams, fresh=True)
    assert one == other and len(set(one)) == 4
