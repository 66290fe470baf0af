"""The NVIDIA kernel: torch's own flash attention operators, with nothing to install.

A single block is a dense call, (batch, seq, heads, dim) as a view of the sequence-first tensors. Packed pieces are one
varlen call, (rows, batch * heads, dim): batch is folded into the heads, so that all batch entries share one cu_seqlens.
A band is passed as a window. The operator supports GQA and dropout itself. If dk != dv, or 8 does not divide a head
dimension, tensors are padded with zeros, which change neither scores nor outputs.

float32, float64, dense masks and head dimensions above 256 use the blockwise kernel, which is announced once.
If torch.nn.attention has activated FlashAttention-3, the same operators run it.

Tested against the operators' schemas on the CPU; not yet run on a GPU.
"""

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
    joined,
)
from mindspeed_cp.kernels.blockwise import BlockwiseKernel
from mindspeed_cp.kernels.random_stream import random_stream
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.sequence.cache import INT_BYTES, kept_up_to
from mindspeed_cp.settings.notices import warn_rank0

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def build() -> AttentionKernel:
    return CudaKernel()


def unavailable() -> str:
    """Why this machine cannot use the CUDA kernel; "" when it can."""
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA device; install a CUDA build of torch, and check `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES."
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return "flash attention needs compute capability 8.0 (Ampere) or newer; choose --cp-kernel blockwise."
    if not torch.backends.cuda.is_flash_attention_available():
        return (
            "this build of torch has no flash attention; install an official CUDA build, or choose "
            "--cp-kernel blockwise."
        )
    return ""


# (out, lse, random state) of one operator call
_Part = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


class CudaKernel(AttentionKernel):
    name = "cuda"
    native_bands = True

    def __init__(self) -> None:
        self._blockwise = BlockwiseKernel()

    def forward(self, tensors: BlockTensors, options: KernelOptions) -> BlockResult:
        if self._needs_blockwise(tensors):
            return self._blockwise.forward(tensors, options)
        head_dim = tensors.value.shape[-1]
        query, key, value = _padded([tensors.query, tensors.key, tensors.value])
        with random_stream(query.device, options.rng_stream if options.dropout_p else 0):
            parts = [self._forward_part(part, options) for _, part in _parts(tensors.with_tensors(query, key, value))]
        outs, lses, states = zip(*parts)
        return BlockResult(joined(outs)[..., :head_dim], joined(lses), states)

    def backward(self, tensors: BlockTensors, rows: AttentionRows, options: KernelOptions, saved: Any) -> Gradients:
        if self._needs_blockwise(tensors):
            return self._blockwise.backward(tensors, rows, options, saved)
        query, key, value = tensors.query, tensors.key, tensors.value
        dims = query.shape[-1], key.shape[-1], value.shape[-1]
        out, grad_out = rows.out.to(query.dtype), rows.grad_out.to(query.dtype)
        query, key, value, out, grad_out = _padded([query, key, value, out, grad_out])
        rows = AttentionRows(grad_out, out, rows.lse)
        grads = [
            self._backward_part(part, rows.cut(q), options, state)
            for (q, part), state in zip(_parts(tensors.with_tensors(query, key, value)), saved, strict=True)
        ]
        dq, dk, dv = (joined(part)[..., :dim] for part, dim in zip(zip(*grads), dims))
        return dq, dk, dv

    def _needs_blockwise(self, tensors: BlockTensors) -> bool:
        head_dim = max(tensors.query.shape[-1], tensors.value.shape[-1])
        reason = None
        if tensors.query.dtype not in DTYPES:
            reason = f"{tensors.query.dtype} tensors"
        elif tensors.attention_mask is not None:
            reason = "a dense attention mask"
        elif head_dim > MAX_HEAD_DIM:
            reason = f"a head dimension of {head_dim}"
        if reason:
            warn_rank0(
                f"--cp-kernel {self.name}: flash attention does not take {reason}; the exact and slower "
                "blockwise kernel computes it (--cp-kernel blockwise chooses it outright)."
            )
        return reason is not None

    def _forward_part(self, part: BlockTensors, options: KernelOptions) -> _Part:
        if part.block.num_pieces > 1:
            return _varlen_forward(part, options)
        return self._dense_forward(part, options)

    def _backward_part(self, part: BlockTensors, rows: AttentionRows, options: KernelOptions, state: Any) -> Gradients:
        if part.block.num_pieces > 1:
            return _varlen_backward(part, rows, options, state)
        return self._dense_backward(part, rows, options, state)

    def _dense_forward(self, part: BlockTensors, options: KernelOptions) -> _Part:
        """One piece; lse is (batch, heads, rows) in the operator."""
        q, k, v = (tensor.transpose(0, 1) for tensor in (part.query, part.key, part.value))
        out, lse, *state, _ = _forward(
            q,
            k,
            v,
            None,
            None,
            q.shape[1],
            k.shape[1],
            options.dropout_p,
            part.block.is_causal,
            False,
            scale=options.softmax_scale,
            **_window(part.block, q.shape[1], k.shape[1]),
        )
        return out.transpose(0, 1), lse.permute(2, 0, 1), state

    def _dense_backward(self, part: BlockTensors, rows: AttentionRows, options: KernelOptions, state: Any) -> Gradients:
        read = (rows.grad_out.contiguous(), part.query, part.key, part.value, rows.out.contiguous())
        # The operator ignores the strides of lse and reads it as contiguous memory.
        dq, dk, dv = _backward(
            *(tensor.transpose(0, 1) for tensor in read),
            rows.lse.permute(1, 2, 0).contiguous(),
            None,
            None,
            part.query.shape[0],
            part.key.shape[0],
            options.dropout_p,
            part.block.is_causal,
            *state,
            scale=options.softmax_scale,
            **_window(part.block, part.query.shape[0], part.key.shape[0]),
        )
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def _varlen_forward(part: BlockTensors, options: KernelOptions) -> _Part:
    """Packed pieces; lse is (batch * heads, rows) in the operator."""
    query = part.query
    out, lse, *state, _ = _forward(
        *(tensor.flatten(1, 2) for tensor in (query, part.key, part.value)),
        *_lengths(part.block, query.device),
        options.dropout_p,
        part.block.is_causal,
        False,
        scale=options.softmax_scale,
    )
    return out.view(*query.shape[:3], -1), lse.t().reshape(query.shape[:3]), state


def _varlen_backward(part: BlockTensors, rows: AttentionRows, options: KernelOptions, state: Any) -> Gradients:
    read = (rows.grad_out.contiguous(), part.query, part.key, part.value, rows.out.contiguous())
    dq, dk, dv = _backward(
        *(tensor.flatten(1, 2) for tensor in read),
        rows.lse.flatten(1).t().contiguous(),
        *_lengths(part.block, part.query.device),
        options.dropout_p,
        part.block.is_causal,
        *state,
        scale=options.softmax_scale,
    )
    return dq.view(part.query.shape), dk.view(part.key.shape), dv.view(part.value.shape)


def _lengths(block: Block, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """cu_seqlens of queries and keys, and the longest piece of each."""
    longest_q, longest_k = (
        max(b - a for a, b in zip(offsets, offsets[1:])) for offsets in (block.q_offsets, block.k_offsets)
    )
    return _cu_seqlens(block.q_offsets, device), _cu_seqlens(block.k_offsets, device), longest_q, longest_k


def _num_bytes(offsets: torch.Tensor) -> int:
    return offsets.nbytes + INT_BYTES * len(offsets)


@kept_up_to(16 << 20, _num_bytes)
def _cu_seqlens(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([offset - offsets[0] for offset in offsets], dtype=torch.int32, device=device)


def _parts(tensors: BlockTensors) -> list[tuple[slice, BlockTensors]]:
    """(query rows, tensors) of each operator call: one for the block, or one for each piece of a band."""
    block = tensors.block
    if block.num_pieces == 1 or block.is_full or block.is_causal:
        return [(slice(None), tensors)]
    return [
        (q, tensors.cut(q, k, Block((q.start, q.stop), (k.start, k.stop), block.lower, block.upper)))
        for q, k in block.pieces()
    ]


def _window(block: Block, rows: int, cols: int) -> dict[str, int]:
    """Window arguments of a band; the operator counts from the diagonal through the lower right corner."""
    if block.is_full or block.is_causal:
        return {}
    shift = cols - rows
    assert block.lower is None or shift >= block.lower, "every row of a band sees a key (blocks.plan_blocks)"
    return {
        "window_size_left": -1 if block.lower is None else shift - block.lower,
        "window_size_right": -1 if block.upper is None else block.upper - shift,
    }


def _padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, zero-padded to a common head dimension that the operator accepts."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    width = -(-widest // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
    return [tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]
