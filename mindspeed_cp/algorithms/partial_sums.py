"""What an attention call sums over its blocks, in the accumulation dtype: the output, and the gradients of its inputs.

Shapes: out (seq, batch, heads, dv), lse (seq, batch, heads), dq (seq, batch, heads, dk), the gradient of a shard of
keys and values (seq, batch, kv_heads, dk + dv).
"""

import torch

from mindspeed_cp.accumulate import add_in_place
from mindspeed_cp.kernels.base import accumulation_dtype


def accumulator(workspace, name, shape, like):
    """Memory for a sum in the accumulation dtype: reused where the result is converted anyway, else fresh, to keep."""
    dtype = accumulation_dtype(like.dtype)
    if dtype == like.dtype:
        return like.new_empty(shape, dtype=dtype)
    return workspace.get(name, shape, dtype, like.device)


class PartialAttention:
    """The merged (out, lse) so far; a first block that covers every row is taken over as it is."""

    def __init__(self, problem, query, value):
        self._problem, self._query, self._shape = problem, query, (*query.shape[:3], value.shape[-1])
        self._out, self._lse, self._owned = None, None, False

    def add(self, rows, block_out, block_lse):
        if self._out is None and rows.stop - rows.start == self._shape[0]:
            self._out, self._lse = block_out, block_lse
            return
        self._own()
        self._problem.merge(self._out[rows], self._lse[rows], block_out, block_lse)

    def _own(self):
        """Move what there is into an accumulator that may be changed in place."""
        if self._owned:
            return
        out = accumulator(self._problem.groups.workspace, "out.sum", self._shape, self._query)
        if self._out is None:
            out.zero_()
            self._lse = torch.full(self._shape[:3], -torch.inf, dtype=out.dtype, device=out.device)
        elif self._out.dtype == out.dtype:
            out = self._out
        else:
            out.copy_(self._out)
        self._out, self._owned = out, True

    def result(self):
        """(out, lse); out may lie in reused memory when its dtype is not the query's."""
        if self._out is None:
            self._own()
        return self._out, self._lse


class RowSum:
    """The sum of the blocks' query gradients; a first block that covers every row is taken over as it is."""

    def __init__(self, like, workspace):
        self._like, self._workspace, self._first, self._total = like, workspace, None, None

    def add(self, rows, part):
        if self._first is None and self._total is None and rows.stop - rows.start == self._like.shape[0]:
            self._first = part
            return
        add_in_place(self._sum()[rows], part)

    def _sum(self):
        if self._total is None:
            total = accumulator(self._workspace, "dq.sum", self._like.shape, self._like)
            if self._first is None:
                total.zero_()
            elif self._first.dtype == total.dtype:
                total = self._first
            else:
                total.copy_(self._first)
            self._total, self._first = total, None
        return self._total

    def result(self):
        return self._first if self._first is not None else self._sum()


class KVPartial:
    """The gradient of one shard of keys and values from this rank's blocks, written into ``target`` (seq, .., dk + dv).

    One block is copied straight into the target, and so rounded once if that is a wire buffer. Several are summed in
    the accumulation dtype first. Rows that no block touches are 0.
    """

    def __init__(self, target, num_blocks, workspace, accumulates):
        self._target, self._single = target, num_blocks <= 1
        self._sum = target
        if not self._single and not accumulates and accumulation_dtype(target.dtype) != target.dtype:
            self._sum = workspace.get("dkv.sum", target.shape, accumulation_dtype(target.dtype), target.device)
        self._covered = slice(0, 0)
        if not self._single:
            self._sum.zero_()

    def add(self, rows, grads, split):
        parts = self._sum[rows, ..., :split], self._sum[rows, ..., split:]
        for part, grad in zip(parts, grads):
            part.copy_(grad) if self._single else add_in_place(part, grad)
        self._covered = rows

    def store(self):
        if self._single:
            self._target[: self._covered.start].zero_()
            self._target[self._covered.stop :].zero_()
        elif self._sum is not self._target:
            self._target.copy_(self._sum)
