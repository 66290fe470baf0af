"""The Ascend NPU kernel: torch_npu.npu_fusion_attention and npu_fusion_attention_grad.

Which call computes a block:

========================  ======  ===========  ================================================================
block                     layout  sparse_mode  mask
========================  ======  ===========  ================================================================
rectangle                 SBH     0            none
causal square             SBH     2            the compressed 2048 x 2048 triangle, one per device
band                      SBH     4            the same triangle; pre_tockens and next_tockens are the two limits
rectangle + dense mask    SBH     1            the dense mask
packed pieces             TND     0 or 2       as above; batch is folded into the heads, so that the pieces of all
                                               batch entries share one list of cumulative lengths
========================  ======  ===========  ================================================================

The operator supports GQA, dropout and dk > dv itself. If dv > dk, query and key are padded with zeros, which do not
change the scores. Only the first packed call waits for the device, to find the memory order of the statistics.
Written from the published schemas, documentation and sources; run on torch_npu without a device (tests/ascend), not yet
on a device.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_cp.kernels.base import (
    AttentionKernel,
    AttentionRows,
    BlockResult,
    BlockTensors,
    Gradients,
    KernelOptions,
    MemoryOrder,
)
from mindspeed_cp.kernels.npu_calls import (
    MAX_HEADS,
    Call,
    assembled,
    compressed_mask,  # noqa: F401
    cumulative,
    num_heads,
    operator_calls,
)
from mindspeed_cp.kernels.npu_setup import unavailable  # noqa: F401  the table's probe of this module
from mindspeed_cp.kernels.npu_statistics import (
    LARGE,
    Statistics,
    StatisticsOrder,
    from_lse,
    probe_order,
    row_permutation,
    to_lse,
)
from mindspeed_cp.kernels.random_stream import random_stream

MAX_HEAD_DIM = 768
MAX_ROWS = 1 << 20  # query rows and key rows of one call: S, or T in TND
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def packed_arguments(torch_npu: ModuleType) -> dict[str, Any]:
    """Further arguments of both installed operators in TND: softmax_layout in 2.1.0.post17, 2.7.1, 2.9.1, 2.13.0.

    Post-releases of an old torch branch contain newer operators (2.1.0.post17 has what 2.5.1 lacks), so the schema is
    asked, not the version number.
    """
    operator = getattr(torch_npu.npu_fusion_attention, "default", None) or torch.ops.npu.npu_fusion_attention.default
    takes_layout = any(argument.name == "softmax_layout" for argument in operator._schema.arguments)
    return {"softmax_layout": "TND"} if takes_layout else {}


def build() -> AttentionKernel:
    return NpuKernel(import_module("torch_npu"))


class NpuKernel(AttentionKernel):
    """Blocks of attention on an NPU; ``torch_npu`` is the module to call."""

    name = "npu"
    native_bands = True

    def memory_order(self, dtype: torch.dtype) -> MemoryOrder | None:
        return "sequence"  # the operators copy what is not contiguous

    def __init__(self, torch_npu: ModuleType) -> None:
        self._npu: Any = torch_npu
        self._packed_arguments = packed_arguments(torch_npu)
        # (further arguments of TND calls, memory order of their statistics); None before the first packed call
        self._packed: tuple[dict[str, Any], StatisticsOrder] | None = None
        self.has_fused_merge = hasattr(torch_npu, "npu_ring_attention_update")

    def forward(self, tensors: BlockTensors, options: KernelOptions) -> BlockResult:
        _check(tensors, options)
        (query, key), value = _padded(tensors), tensors.value
        calls = list(operator_calls(query, key, tensors.block, tensors.attention_mask))
        outs, lses, states = [], [], []
        stream = options.rng_stream if options.dropout_p else 0
        for call in calls:
            further = self._arguments(call, query.device)
            with random_stream(query.device, stream):
                out, softmax_max, softmax_sum, _, *state = self._npu.npu_fusion_attention(
                    call.operand(query, call.q),
                    call.operand(key, call.k),
                    call.operand(value, call.k),
                    num_heads(query, call),
                    call.layout,
                    scale=options.softmax_scale,
                    keep_prob=1.0 - options.dropout_p,
                    **further,
                )
            shape = query[call.q, call.batch].shape[:3]
            outs.append(out.view(*shape, -1))
            lses.append(self._rows_first(to_lse(softmax_max, softmax_sum), call, shape))
            states.append(tuple(state))
        out = assembled(outs, [call.q for call in calls], calls, (*query.shape[:3], value.shape[-1]))
        lse = assembled(lses, [call.q for call in calls], calls, query.shape[:3])
        if tensors.attention_mask is not None:
            _clear_empty_rows(out, lse, tensors.attention_mask)
        statistics = None
        if options.fused_merge and tensors.attention_mask is None and len(calls) == 1 and calls[0].q_lengths is None:
            statistics = softmax_max, softmax_sum
        return BlockResult(out, lse, tuple(states) if options.dropout_p else None, statistics)

    def backward(self, tensors: BlockTensors, rows: AttentionRows, options: KernelOptions, saved: Any) -> Gradients:
        head_dim = tensors.query.shape[-1]
        (query, key), value = _padded(tensors), tensors.value
        out, grad_out = rows.out.to(query.dtype), rows.grad_out.to(query.dtype)
        calls, parts = list(operator_calls(query, key, tensors.block, tensors.attention_mask)), []
        # Without dropout, forward leaves the three numbers uninitialised.
        for call, (seed, offset, numels) in zip(calls, saved or [(0, 0, 0)] * len(calls), strict=True):
            softmax_max, softmax_sum = self._statistics(rows, call)
            parts.append(
                self._npu.npu_fusion_attention_grad(
                    call.operand(query, call.q),
                    call.operand(key, call.k),
                    call.operand(value, call.k),
                    call.operand(grad_out, call.q),
                    num_heads(query, call),
                    call.layout,
                    softmax_max=softmax_max,
                    softmax_sum=softmax_sum,
                    attention_in=call.operand(out, call.q),
                    scale_value=options.softmax_scale,
                    keep_prob=1.0 - options.dropout_p,
                    seed=seed,
                    offset=offset,
                    numels=numels,
                    **self._arguments(call, query.device),
                )[:3]
            )
        q_rows, k_rows = [call.q for call in calls], [call.k for call in calls]
        dq, dk, dv = (
            assembled(
                [part.view(like[rows, call.batch].shape) for part, rows, call in zip(grads, all_rows, calls)],
                all_rows,
                calls,
                like.shape,
            )
            for grads, all_rows, like in zip(zip(*parts), (q_rows, k_rows, k_rows), (query, key, value))
        )
        return dq[..., :head_dim], dk[..., :head_dim], dv

    def merge(self, out: torch.Tensor, lse: torch.Tensor, statistics: Any, block: BlockResult) -> Any:
        """``merge_attention`` by npu_ring_attention_update: the same result, one operator.

        It takes (max, sum) of both sides: those that the operators returned, or else equivalents computed from the lse.
        """
        if not self.has_fused_merge:
            return super().merge(out, lse, statistics, block)
        merged, *total = self._npu.npu_ring_attention_update(
            out.flatten(2),
            *(statistics or _finite(lse)),
            block.out.to(out.dtype).flatten(2),
            *(block.statistics or _finite(block.lse)),
            input_layout="SBH",
        )
        out.copy_(merged.view(out.shape))
        total_lse = to_lse(*total).permute(2, 0, 1)
        lse.copy_(total_lse.masked_fill(total_lse <= -LARGE / 2, -torch.inf))
        return total

    def _arguments(self, call: Call, device: torch.device) -> dict[str, Any]:
        if call.q_lengths is None or call.k_lengths is None:
            return call.mask_arguments
        return {
            **call.mask_arguments,
            **self._packed_calls(device)[0],
            "actual_seq_qlen": cumulative(call.q_lengths),
            "actual_seq_kvlen": cumulative(call.k_lengths),
        }

    def _packed_calls(self, device: torch.device) -> tuple[dict[str, Any], StatisticsOrder]:
        """(further arguments of TND calls, memory order of their statistics); the first call probes the device.

        torch_npu defines the schema, but CANN the implementation: softmax_layout needs CANN 8.3.RC1, and with older
        releases the operator raises a RuntimeError.
        """
        if self._packed is None:
            further = self._packed_arguments
            try:
                order = probe_order(partial(self._probe, further), device)
            except RuntimeError:
                if not further:
                    raise
                further = {}
                order = probe_order(partial(self._probe, further), device)
            self._packed = further, order
        return self._packed

    def _rows_first(self, lse: torch.Tensor, call: Call, shape: Sequence[int]) -> torch.Tensor:
        """lse in the operator's memory order -> (rows, batch, heads)."""
        if call.q_lengths is None:
            return lse.permute(2, 0, 1)
        permutation = self._permutation(call, shape, lse.device)
        return (lse if permutation is None else lse.reshape(-1)[permutation]).view(*shape)

    def _statistics(self, rows: AttentionRows, call: Call) -> Statistics:
        """The operator's (max, sum) for the whole attention's lse, computed once for blocks that share query rows."""
        place = call.q.start, call.q.stop, call.batch.start, call.batch.stop, call.q_lengths
        return rows.once(("npu statistics", *place), lambda: self._new_statistics(rows.lse[call.q, call.batch], call))

    def _new_statistics(self, lse: torch.Tensor, call: Call) -> Statistics:
        if call.q_lengths is None:
            return from_lse(lse.permute(1, 2, 0))
        permutation, rows = self._permutation(call, lse.shape, lse.device), lse.flatten(1)
        if permutation is None:
            return from_lse(rows)
        ordered = torch.empty_like(rows, memory_format=torch.contiguous_format)
        ordered.view(-1)[permutation] = rows.reshape(-1)
        return from_lse(ordered)

    def _permutation(self, call: Call, shape: Sequence[int], device: torch.device) -> torch.Tensor | None:
        assert call.q_lengths is not None
        return row_permutation(self._packed_calls(device)[1], call.q_lengths, shape[1] * shape[2], device)

    def _probe(
        self,
        further: dict[str, Any],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
    ) -> Statistics:
        ends = cumulative(lengths)
        softmax_max, softmax_sum = self._npu.npu_fusion_attention(
            query, key, value, query.shape[1], "TND", scale=1.0, actual_seq_qlen=ends, actual_seq_kvlen=ends, **further
        )[1:3]
        return softmax_max, softmax_sum


def _finite(lse: torch.Tensor) -> Statistics:
    """The operator's (max, sum) for lse (rows, batch, heads), without -inf, which the operator would turn into NaN."""
    return from_lse(lse.permute(1, 2, 0).clamp(min=-LARGE))


def _check(tensors: BlockTensors, options: KernelOptions) -> None:
    """Raise ValueError for inputs that the operators do not support."""
    query, key, value = tensors.query, tensors.key, tensors.value
    if query.dtype not in DTYPES:
        raise ValueError(
            f"--cp-kernel npu does not take {query.dtype} tensors, only float16, bfloat16 and float32; "
            "use float32, or train in --bf16."
        )
    if options.dropout_p >= 1:
        raise ValueError(
            f"--attention-dropout {options.dropout_p} leaves nothing, and --cp-kernel npu does not take it; choose a "
            "value below 1."
        )
    rows = max(query.shape[0], key.shape[0])
    if rows > MAX_ROWS:
        raise ValueError(
            f"--cp-kernel npu takes at most {MAX_ROWS} query and key rows (S, T) in one call, got {rows}; raise "
            "--context-parallel-size, or choose --cp-kernel blockwise."
        )
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"--cp-kernel npu does not take a head dimension of {head_dim}, at most {MAX_HEAD_DIM}; "
            "choose --cp-kernel blockwise."
        )
    if query.shape[2] > MAX_HEADS:
        raise ValueError(
            f"--cp-kernel npu takes at most {MAX_HEADS} heads per rank, got {query.shape[2]}; raise "
            "--tensor-model-parallel-size, or choose --cp-kernel blockwise."
        )


def _padded(tensors: BlockTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key, zero-padded to value's dimension, because the operator requires dk >= dv."""
    query, key, missing = tensors.query, tensors.key, tensors.value.shape[-1] - tensors.key.shape[-1]
    return (query, key) if missing <= 0 else (F.pad(query, (0, missing)), F.pad(key, (0, missing)))


def _clear_empty_rows(out: torch.Tensor, lse: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Set out to 0 and lse to -inf where a dense mask hides every key; the operator returns other values there."""
    empty = attention_mask.all(-1).t().unsqueeze(-1)
    out.masked_fill_(empty.unsqueeze(-1), 0)
    lse.masked_fill_(empty, -torch.inf)
