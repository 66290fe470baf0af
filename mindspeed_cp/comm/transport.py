"""The few torch.distributed calls that everything else is made of; a failure names the ranks that were waited for."""

from contextlib import contextmanager

import torch.distributed as dist

from mindspeed_cp.comm.counters import record

# torch 2.13 renames the collective and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def _naming(purpose, peers):
    """Turn a back end's error into one that says who was waited for and why."""
    try:
        yield
    except RuntimeError as error:
        who = ", ".join(str(peer) for peer in peers)
        raise RuntimeError(f"context parallelism: global rank {dist.get_rank()} lost rank {who} while exchanging {purpose}; "
                           f"look at the log of that rank first. Back end: {error}") from error


class Transfer:
    """Posted work; ``wait`` returns when the received data is there and the sent buffers are free."""

    def __init__(self, works, purpose):
        self._works, self._purpose = works, purpose

    def wait(self):
        for work, peers in self._works:
            with _naming(self._purpose, peers):
                work.wait()


def post(group, sends, receives, purpose):
    """Post sends and receives without waiting; empty tensors are skipped on both sides, which know each other's sizes.

    Args:
        group: process group that holds both ends.
        sends, receives: lists of (global rank of the peer, contiguous tensor).
        purpose: what the bytes count as; a suffix after a dot tells buffers apart and is not counted separately.
    """
    purpose = purpose.partition(".")[0]
    sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
    receives = [(peer, tensor) for peer, tensor in receives if tensor.numel()]
    ops = [dist.P2POp(dist.isend, tensor, peer, group) for peer, tensor in sends]
    ops += [dist.P2POp(dist.irecv, tensor, peer, group) for peer, tensor in receives]
    peers = [peer for peer, _ in sends + receives]
    for _, tensor in sends:
        record({purpose: tensor.numel() * tensor.element_size()})
    if not ops:
        return Transfer([], purpose)
    with _naming(purpose, sorted(set(peers))):
        works = dist.batch_isend_irecv(ops)
    # NCCL and HCCL return one work for the whole batch, gloo one for each operation.
    each = [[peer] for peer in peers] if len(works) == len(peers) else [sorted(set(peers))] * len(works)
    return Transfer(list(zip(works, each)), purpose)


def all_gather(gathered, tensor, group, purpose, count=True):
    """Start gathering equal contiguous tensors into ``gathered`` (ranks in order along dimension 0); returns a Transfer.

    ``count`` False leaves the bytes to the caller.
    """
    if count:
        record({purpose.partition(".")[0]: tensor.numel() * tensor.element_size() * (dist.get_world_size(group) - 1)})
    return _collective(purpose, group, lambda: _all_gather(gathered, tensor, group=group, async_op=True))


def all_to_all(received, send, receive_sizes, send_sizes, group, purpose):
    """Start an all-to-all of flat tensors with sizes in elements; the caller counts the bytes; returns a Transfer."""
    return _collective(purpose, group, lambda: dist.all_to_all_single(
        received, send, receive_sizes, send_sizes, group=group, async_op=True))


def _collective(purpose, group, start):
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    with _naming(purpose, others):
        return Transfer([(start(), others)], purpose)
