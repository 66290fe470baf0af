"""Point-to-point transfers, posted together and awaited later."""

import torch.distributed as dist

from mindspeed_cp.comm.counters import record


class Transfer:
    """Posted sends and receives; ``wait`` returns when the received data is there and the sent buffers are free."""

    def __init__(self, works):
        self._works = works

    def wait(self):
        for work in self._works:
            work.wait()


def post(group, sends, receives, purpose):
    """Post sends and receives without waiting; empty tensors are skipped on both sides, which know each other's sizes.

    Args:
        group: process group that holds both ends.
        sends, receives: lists of (global rank of the peer, contiguous tensor).
        purpose: what the bytes count as.
    """
    sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
    ops = [dist.P2POp(dist.isend, tensor, peer, group) for peer, tensor in sends]
    ops += [dist.P2POp(dist.irecv, tensor, peer, group) for peer, tensor in receives if tensor.numel()]
    for _, tensor in sends:
        record({purpose: tensor.numel() * tensor.element_size()})
    return Transfer(dist.batch_isend_irecv(ops) if ops else [])
