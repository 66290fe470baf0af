"""What an attention call merges and sums over its blocks, in the accumulation dtype: out and lse, and the gradients.

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

# (out, lse, their statistics, a block's result) -> the statistics of what out and lse are then; see AttentionKernel.
Merge = Callable[[torch.Tensor, torch.Tensor, Any, BlockResult], Any]


def add_softmax_offset(out: torch.Tensor, lse: torch.Tensor, offset: torch.Tensor) -> None:
    """Let every row see one more key with score ``offset`` and value 0 (an attention sink), in place.

    Args:
        out, lse: as in ``merge_attention``.
        offset: (heads,) unscaled extra logit of each head.
    """
    offset = offset.to(lse.dtype)
    # A row without keys sees the sink alone: its out is 0 already, and sigmoid(-inf) keeps it so.
    out.mul_(torch.sigmoid(lse - offset).unsqueeze(-1))
    torch.logaddexp(lse, offset.expand_as(lse), out=lse)


def softmax_offset_gradient(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Gradient (heads,) of ``add_softmax_offset``'s offset; out and lse are those that include it.

    The sink's value is 0, so the gradient of its score is -p * delta with p = exp(offset - lse), delta = sum(grad_out *
    out).
    """
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(torch.exp(offset.to(lse.dtype) - lse) * delta).sum((0, 1)).to(offset.dtype)


def plain_merge(out: torch.Tensor, lse: torch.Tensor, statistics: Any, block: BlockResult) -> None:
    """``AttentionKernel.merge`` by torch operations."""
    merge_attention(out, lse, block.out, block.lse)


def merge_function(kernel: AttentionKernel, fused: bool) -> Merge:
    """The function that merges a block's result into the attention so far.

    Args:
        fused: use the kernel's own operator (--use-fused-ring-attention-update); where it has none, that is said once.
    """
    if fused and not kernel.has_fused_merge:
        warn_rank0(
            f"--use-fused-ring-attention-update changes nothing: kernel {kernel.name} has no fused update here; "
            "blocks are merged in place by torch operations."
        )
    return kernel.merge if fused and kernel.has_fused_merge else plain_merge


def accumulator(workspace: Workspace, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Memory for a sum in the accumulation dtype: reused where the result is converted anyway, else fresh, to keep."""
    dtype = accumulation_dtype(like.dtype)
    if dtype == like.dtype:
        return like.new_empty(shape, dtype=dtype)
    return workspace.get(name, shape, dtype, like.device)


def _is_whole(rows: slice, batch: slice, tensor: torch.Tensor) -> bool:
    return (
        len(range(tensor.shape[0])[rows]) == tensor.shape[0] and len(range(tensor.shape[1])[batch]) == tensor.shape[1]
    )


class PartialAttention:
    """The merged (out, lse) so far; a first block that covers every row is taken over as it is."""

    def __init__(self, workspace: Workspace, merge: Merge, query: torch.Tensor, dv: int) -> None:
        self._workspace, self._merge, self._query, self._shape = workspace, merge, query, (*query.shape[:3], dv)
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self._owned = False
        # Of the rows that were merged last: what they are, and the kernel's own form of their lse.
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
        """(out, lse) in accumulators that may be changed in place."""
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
        """(out, lse); out may lie in reused memory when its dtype is not the query's."""
        return self._own() if self._out is None or self._lse is None else (self._out, self._lse)


class RowSum:
    """The sum of the blocks' query gradients; a first block that covers every row is taken over as it is."""

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

    Those of one block of the whole batch are stored as they are, and so rounded once if they travel. Several blocks are
    summed in the accumulation dtype first. Rows that no block touches are 0.
    """

    def __init__(self, targets: Sequence[torch.Tensor], single: bool, workspace: Workspace, accumulates: bool) -> None:
        """targets: (seq, batch, kv_heads, dk) and (.., dv). single: at most one block comes, of the whole batch.
        accumulates: the targets are in the accumulation dtype.
        """
        self._targets, self._single, self._sums = targets, single, targets
        self._grads: Sequence[torch.Tensor] = ()  # of the one block
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
        """All rows of the key's gradient and of the value's; in the targets, unless one block made just them."""
        if self._grads and self._covers_all:
            return self._grads
        self.store()
        return self._targets

    @property
    def _covers_all(self) -> bool:
        return (self._covered.start, self._covered.stop) == (0, self._targets[0].shape[0])

    def rows(self, ranges: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """These rows, (start, stop), of the key's gradient and of the value's; in the targets, unless one block made
        just them.
        """
        if not ranges or (self._grads and ranges == ((self._covered.start, self._covered.stop),)):
            return list(self._grads) if ranges else []
        self.store()
        return [target[start:stop] for target in self._targets for start, stop in ranges]
