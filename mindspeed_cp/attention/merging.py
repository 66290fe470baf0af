"""Merge out and lse, and sum gradients, over the blocks of an attention call, in the accumulation dtype.

Shapes: out (seq, batch, heads, dv), lse (seq, batch, heads), dq (seq, batch, heads, dk), the gradient of a shard of
keys and values (seq, batch, kv_heads, dk + dv). A block covers some rows of the sequence (``rows``) for some rows of
the batch (``batch``), both slices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mindspeed_cp.comm.workspace import Workspace
from mindspeed_cp.kernels.base import AttentionKernel, BlockResult, accumulation_dtype
from mindspeed_cp.kernels.merge import add_in_place, merge_attention
from mindspeed_cp.settings.notices import warn_rank0

# (out, lse, their statistics, a block's result) -> the statistics of the merged out and lse; see AttentionKernel.
Merge = Callable[[torch.Tensor, torch.Tensor, Any, BlockResult], Any]


def add_softmax_offset(out: torch.Tensor, lse: torch.Tensor, offset: torch.Tensor) -> None:
    """Add to every row a key with score ``offset`` and value 0 (an attention sink), in place.

    Args:
        out, lse: as in ``merge_attention``.
        offset: (heads,), an unscaled extra logit per head.
    """
    offset = offset.to(lse.dtype)
    # A row without keys sees only the sink: its out is already 0, and sigmoid(-inf) = 0 keeps it.
    out.mul_(torch.sigmoid(lse - offset).unsqueeze(-1))
    torch.logaddexp(lse, offset.expand_as(lse), out=lse)


def softmax_offset_gradient(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Gradient (heads,) of ``add_softmax_offset``'s offset; out and lse include the offset.

    The sink's value is 0, so the gradient of its score is -p * delta with p = exp(offset - lse), delta = sum(grad_out *
    out).
    """
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(torch.exp(offset.to(lse.dtype) - lse) * delta).sum((0, 1)).to(offset.dtype)


def plain_merge(out: torch.Tensor, lse: torch.Tensor, statistics: Any, block: BlockResult) -> None:
    """``AttentionKernel.merge`` with torch operations."""
    merge_attention(out, lse, block.out, block.lse)


def merge_function(kernel: AttentionKernel, fused: bool) -> Merge:
    """The function that merges a block's result into the attention so far.

    Args:
        fused: use the kernel's own operator (--use-fused-ring-attention-update); if it has none, a notice says so.
    """
    if fused and not kernel.has_fused_merge:
        warn_rank0(
            f"--use-fused-ring-attention-update changes nothing: kernel {kernel.name} has no fused update here; "
            "blocks are merged in place by torch operations."
        )
    return kernel.merge if fused and kernel.has_fused_merge else plain_merge


def accumulator(workspace: Workspace, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Memory for a sum in the accumulation dtype: reused memory if the result is converted anyway, else new memory."""
    dtype = accumulation_dtype(like.dtype)
    if dtype == like.dtype:
        return like.new_empty(shape, dtype=dtype)
    return workspace.get(name, shape, dtype, like.device)


def _is_whole(rows: slice, batch: slice, tensor: torch.Tensor) -> bool:
    return (
        len(range(tensor.shape[0])[rows]) == tensor.shape[0] and len(range(tensor.shape[1])[batch]) == tensor.shape[1]
    )


class PartialAttention:
    """The merged (out, lse) so far; a first block that covers every row is used without a copy."""

    def __init__(self, workspace: Workspace, merge: Merge, query: torch.Tensor, dv: int) -> None:
        self._workspace, self._merge, self._query, self._shape = workspace, merge, query, (*query.shape[:3], dv)
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self._owned = False
        # The rows that were merged last, and the kernel's own form of their lse.
        self._merged: tuple[slice, slice] | None = None
        self._statistics: Any = None

    def add(self, rows: slice, batch: slice, block: BlockResult) -> None:
        if self._out is None and _is_whole(rows, batch, self._query):
            self._out, self._lse, self._statistics = block.out, block.lse, block.statistics
        else:
            known = self._statistics if self._merged == (rows, batch) else None
            out, lse = self._own()
            self._statistics = self._merge(out[rows, batch], lse[rows, batch], known, block)
        self._merged = rows, batch

    def _own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) as accumulators that may be changed in place."""
        if self._owned and self._out is not None and self._lse is not None:
            return self._out, self._lse
        out = accumulator(self._workspace, "out.sum", self._shape, self._query)
        lse = self._lse
        if self._out is None or lse is None:
            out.zero_()
            lse = torch.full(self._shape[:3], -torch.inf, dtype=out.dtype, device=out.device)
        elif self._out.dtype == out.dtype:
            out = self._out
        else:
            out.copy_(self._out)
        self._out, self._lse, self._owned = out, lse, True
        return out, lse

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse); out may be in reused memory if its dtype is not the query's."""
        return self._own() if self._out is None or self._lse is None else (self._out, self._lse)


class RowSum:
    """The sum of the blocks' query gradients; a first block that covers every row is used without a copy."""

    def __init__(self, like: torch.Tensor, workspace: Workspace) -> None:
        self._like, self._workspace = like, workspace
        self._first: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def add(self, rows: slice, batch: slice, part: torch.Tensor) -> None:
        if self._first is None and self._total is None and _is_whole(rows, batch, self._like):
            self._first = part
            return
        add_in_place(self._sum()[rows, batch], part)

    def _sum(self) -> torch.Tensor:
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

    def result(self) -> torch.Tensor:
        return self._first if self._first is not None else self._sum()


class KVPartial:
    """The gradients of one shard of keys and values from this rank's blocks.

    The gradients of a single block of the whole batch are stored directly, and thus rounded once if they travel. Those
    of several blocks are first summed in the accumulation dtype. Rows that no block reads are 0.
    """

    def __init__(self, targets: Sequence[torch.Tensor], single: bool, workspace: Workspace, accumulates: bool) -> None:
        """targets: (seq, batch, kv_heads, dk) and (.., dv). single: whether at most one block, of the whole batch, is
        added. accumulates: whether the targets are in the accumulation dtype.
        """
        self._targets, self._single, self._sums = targets, single, targets
        self._grads: Sequence[torch.Tensor] = ()  # of the single block
        dtype = accumulation_dtype(targets[0].dtype)
        if not single and not accumulates and dtype != targets[0].dtype:
            self._sums = [
                workspace.get(f"dkv.sum{index}", target.shape, dtype, target.device)
                for index, target in enumerate(targets)
            ]
        self._covered = slice(0, 0)
        if not single:
            for total in self._sums:
                total.zero_()

    def add(self, rows: slice, batch: slice, grads: Sequence[torch.Tensor]) -> None:
        if self._single:
            self._grads, self._covered = grads, rows
            return
        for total, grad in zip(self._sums, grads):
            add_in_place(total[rows, batch], grad)

    def store(self) -> None:
        """Write the gradients of the whole shard into the targets."""
        for target, total in zip(self._targets, self._sums):
            if self._single:
                target[: self._covered.start].zero_()
                target[self._covered.stop :].zero_()
            elif total is not target:
                target.copy_(total)
        for target, grad in zip(self._targets, self._grads):
            target[self._covered].copy_(grad)

    def whole(self) -> Sequence[torch.Tensor]:
        """All rows of the gradients of key and value; in the targets, unless a single block covers exactly them."""
        if self._grads and self._covers_all:
            return self._grads
        self.store()
        return self._targets

    @property
    def _covers_all(self) -> bool:
        return (self._covered.start, self._covered.stop) == (0, self._targets[0].shape[0])

    def rows(self, ranges: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """These rows, (start, stop), of the gradients of key and value; in the targets, unless a single block covers
        exactly them.
        """
        if not ranges or (self._grads and ranges == ((self._covered.start, self._covered.stop),)):
            return list(self._grads) if ranges else []
        self.store()
        return [target[start:stop] for target in self._targets for start, stop in ranges]
