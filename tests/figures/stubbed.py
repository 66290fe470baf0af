"""Attention without its computation: what is left is communication, merging and copying."""

import time

import torch
import torch.distributed as dist

from mindspeed_cp.kernels.base import AttentionKernel, BlockResult, BlockTensors


class StubKernel(AttentionKernel):
    """Returns outputs of the right shapes that were made once: what is left is communication, merging and copying.

    Args:
        seconds: that a pass takes for each query head.
    """

    name, native_bands = "stub", True

    def __init__(self, order="heads", seconds=0.0):
        self._outputs, self._order, self._seconds = {}, order, seconds

    def memory_order(self, dtype):
        return self._order

    def _output(self, name, shape, dtype):
        key = (name, tuple(shape), dtype)
        if key not in self._outputs:
            self._outputs[key] = torch.zeros(shape, dtype=dtype)
        return self._outputs[key]

    def forward(self, tensors, options):
        query, value = tensors.query, tensors.value
        time.sleep(self._seconds * query.shape[2])
        lse = self._output("lse", query.shape[:3], torch.float32)
        return BlockResult(self._output("out", (*query.shape[:3], value.shape[-1]), query.dtype), lse.clone())

    def backward(self, tensors, rows, options, saved):
        time.sleep(self._seconds * tensors.query.shape[2])
        likes = (("dq", tensors.query), ("dk", tensors.key), ("dv", tensors.value))
        return tuple(self._output(name, like.shape, like.dtype) for name, like in likes)


def reference_ring_step(query, key, value, grad_out, kernel, group, rank):
    """A straightforward ring with a stubbed kernel: K and V sent separately, fresh buffers, merging out of place.

    Forward passes K and V on; backward passes them on again together with their summed gradients, cp times.
    """
    ranks = group.size()

    def rotate(tensors):
        received = [torch.empty_like(tensor) for tensor in tensors]
        ops = [
            op
            for tensor, into in zip(tensors, received)
            for op in (
                dist.P2POp(dist.isend, tensor, (rank + 1) % ranks, group),
                dist.P2POp(dist.irecv, into, (rank - 1) % ranks, group),
            )
        ]
        return dist.batch_isend_irecv(ops), received

    half, out, lse = query.shape[0] // 2, None, None
    local = (key.contiguous(), value.contiguous())
    everything, first, second = slice(None), slice(half), slice(half, None)
    blocks = [
        (everything, everything) if t == 0 else (everything, first) if t <= rank else (second, everything)
        for t in range(ranks)
    ]
    kv = local
    for t, (rows, _) in enumerate(blocks):
        works, following = rotate(kv) if t + 1 < ranks else ((), None)
        block_out, block_lse, *_ = kernel.forward(BlockTensors(None, query[rows], None, value), None)
        block_out, block_lse = block_out.float(), block_lse.unsqueeze(-1)
        if out is None:
            out, lse = block_out, block_lse
        else:
            merged = out[rows] - torch.sigmoid(block_lse - lse[rows]) * (out[rows] - block_out)
            merged_lse = lse[rows] - torch.nn.functional.logsigmoid(lse[rows] - block_lse)
            out, lse = out.clone(), lse.clone()
            out[rows], lse[rows] = merged, merged_lse
        for work in works:
            work.wait()
        kv = following
    out = out.to(query.dtype)
    kv, dq, pending, arriving = local, None, (), None
    for t, (rows, keys) in enumerate(blocks):
        works, following = rotate(kv) if t + 1 < ranks else ((), None)
        part = kernel.backward(BlockTensors(None, query[rows], key[keys], value[keys]), None, None, None)
        if dq is None:
            dq, dkv = part[0].float(), [part[1].float(), part[2].float()]
        else:
            dq[rows] += part[0]
            for work in pending:
                work.wait()
            dkv = [grad.clone() for grad in arriving]
            for grad, piece in zip(dkv, part[1:]):
                grad[keys] += piece
        for work in works:
            work.wait()
        kv = following
        pending, arriving = rotate(dkv)
    for work in pending:
        work.wait()
    return out, dq.to(query.dtype), arriving[0].to(key.dtype), arriving[1].to(key.dtype)
