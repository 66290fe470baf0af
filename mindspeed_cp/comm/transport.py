"""The few torch.distributed calls that everything else is made of; a failure names the ranks that were waited for.

Between ranks of one host, large CPU tensors cross through shared memory (``host_memory``) and only notices are sent.
That changes no result, no order and no count of bytes.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_cp.comm.counters import record
from mindspeed_cp.comm.host_memory import BY_GLOO, Parcel

# torch 2.13 renames the collective and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def _naming(purpose, peers):
    """Turn a back end's error into one that says who was waited for and why."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        who = ", ".join(str(peer) for peer in peers)
        raise RuntimeError(
            f"context parallelism: global rank {dist.get_rank()} lost rank {who} while exchanging {purpose}; "
            f"look at the log of that rank first. Back end: {error}"
        ) from error


@dataclass(frozen=True)
class _Arrival:
    """What a peer sends for ``target``: straight into it, or with a notice into shared memory."""

    peer: int
    target: torch.Tensor
    notice: torch.Tensor | None

    @property
    def lands_in(self):
        return self.target if self.notice is None else self.notice


class Transfer:
    """Posted work; ``wait`` returns when the received data is there and the sent buffers are free.

    Args:
        works: list of (work, global ranks that it waits for); receives first, because a notice may ask for one more.
    """

    def __init__(self, works, purpose, arrivals=(), host=None, group=None):
        self._works, self._purpose, self._arrivals, self._host, self._group = works, purpose, arrivals, host, group

    def wait(self):
        for (_, view), arrival in zip(self.peek(), self._arrivals):
            if view is not arrival.target:
                arrival.target.view(-1).copy_(view)
        self.release()

    def peek(self):
        """Wait, and return (peer, what it sent) in the order of the receives: the target itself, or the sender's
        memory.

        Such memory is flat and may be read until ``release``, which must follow.
        """
        receives, sends = self._works[: len(self._arrivals)], self._works[len(self._arrivals) :]
        self._await(receives)
        views = [(arrival.peer, self._view(arrival)) for arrival in self._arrivals]
        self._await(sends)
        return views

    def _await(self, works):
        for work, peers in works:
            with _naming(self._purpose, peers):
                work.wait()

    def _view(self, arrival):
        if arrival.notice is None:
            return arrival.target
        with _naming(self._purpose, [arrival.peer]):
            expected = arrival.target.numel() * arrival.target.element_size()
            place, size, number, _ = arrival.notice.tolist()
            if size != expected:
                raise RuntimeError(f"rank {arrival.peer} sent {size} bytes where {expected} were expected")
            if place == BY_GLOO:
                dist.irecv(arrival.target, arrival.peer, self._group, tag=number).wait()
                return arrival.target
            return self._host.read(arrival.peer, arrival.notice).view(arrival.target.dtype)

    def release(self):
        for arrival in self._arrivals:
            if arrival.notice is not None and arrival.notice[0] != BY_GLOO:
                self._host.release(arrival.peer, arrival.notice)


def post(group, sends, receives, purpose, host=None, count=True):
    """Post sends and receives without waiting; empty tensors are skipped on both sides, which know each other's sizes.

    Args:
        group: process group that holds both ends.
        sends: list of (global rank of the peer, contiguous tensor, or Parcel of ``host`` that holds the message).
        receives: list of (global rank of the peer, contiguous tensor).
        purpose: what the bytes count as; a suffix after a dot tells buffers apart and is not counted separately.
        host: HostMemory, or None to send everything.
        count: False leaves the bytes to the caller.
    """
    purpose = purpose.partition(".")[0]
    sends = [(peer, message) for peer, message in sends if isinstance(message, Parcel) or message.numel()]
    arrivals = [
        _Arrival(peer, tensor, _no_notice_yet() if host and host.carries(peer, tensor) else None)
        for peer, tensor in receives
        if tensor.numel()
    ]
    ops = [dist.P2POp(dist.irecv, arrival.lands_in, arrival.peer, group) for arrival in arrivals]
    for peer, message in sends:
        ops += _leaving(host, group, peer, message)
    if count:
        for _, tensor in sends:
            record({purpose: tensor.numel() * tensor.element_size()})
    if not ops:
        return Transfer([], purpose)
    peers = [op.peer for op in ops]
    with _naming(purpose, sorted(set(peers))):
        works = dist.batch_isend_irecv(ops)
    # NCCL and HCCL return one work for the whole batch, gloo one for each operation.
    each = [[peer] for peer in peers] if len(works) == len(peers) else [sorted(set(peers))] * len(works)
    return Transfer(list(zip(works, each)), purpose, arrivals, host, group)


def _no_notice_yet():
    return torch.empty(4, dtype=torch.int64, device="cpu")


def _leaving(host, group, peer, message):
    """The operations that send a message: itself, or the notice of where it is, or a notice and itself."""
    if isinstance(message, Parcel):
        return [dist.P2POp(dist.isend, message.notice(), peer, group)]
    if host is None or not host.carries(peer, message):
        return [dist.P2POp(dist.isend, message, peer, group)]
    parcel = host.write([peer], message)
    if parcel is not None:
        return [dist.P2POp(dist.isend, parcel.notice(), peer, group)]
    notice = host.notice_of_gloo(message.numel() * message.element_size())
    number = int(notice[2])
    return [dist.P2POp(dist.isend, notice, peer, group), dist.P2POp(dist.isend, message, peer, group, tag=number)]


def all_gather(gathered, tensor, group, purpose, host=None, count=True):
    """Start gathering equal contiguous tensors into ``gathered`` (ranks in order along dimension 0); returns a
    Transfer.

    Args:
        host: HostMemory; where it reaches the whole group, each rank writes its tensor once and all others read it.
        count: False leaves the bytes to the caller.
    """
    if count:
        record({purpose.partition(".")[0]: tensor.numel() * tensor.element_size() * (dist.get_world_size(group) - 1)})
    others = _others(group)
    if host is None or not all(host.carries(peer, tensor) for peer in others):
        return _collective(purpose, others, lambda: _all_gather(gathered, tensor, group=group, async_op=True))
    shards = gathered.view(dist.get_world_size(group), *tensor.shape)
    shards[dist.get_rank(group)] = tensor
    parcel = host.write(others, tensor)
    receives = [(peer, shards[dist.get_group_rank(_known(group), peer)]) for peer in others]
    return post(
        group, [(peer, tensor if parcel is None else parcel) for peer in others], receives, purpose, host, count=False
    )


def all_to_all(received, send, receive_sizes, send_sizes, group, purpose):
    """Start an all-to-all of flat tensors with sizes in elements; the caller counts the bytes; returns a Transfer."""
    return _collective(
        purpose,
        _others(group),
        lambda: dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=group, async_op=True),
    )


def _collective(purpose, others, start):
    with _naming(purpose, others):
        return Transfer([(start(), others)], purpose)


def _known(group):
    return dist.group.WORLD if group is None else group


def _others(group):
    return [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
