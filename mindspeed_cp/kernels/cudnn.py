"""cuDNN attention for full and causal blocks, often faster on Hopper; everything else as in the CUDA kernel.

Selected only by --cp-kernel cudnn; ``scripts/bench kernels`` shows which kernel is faster on a machine.
Tested against the operators' schemas on the CPU; not yet run on a GPU.
"""

from typing import Any

import torch

from mindspeed_cp.kernels import cuda
from mindspeed_cp.kernels.base import AttentionKernel, AttentionRows, BlockTensors, Gradients, KernelOptions

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def build() -> AttentionKernel:
    return CudnnKernel()


def unavailable() -> str:
    """Why this machine cannot use cuDNN attention; "" when it can."""
    reason = cuda.unavailable()
    if not reason and not torch.backends.cudnn.is_available():
        reason = "this build of torch has no cuDNN; leave --cp-kernel out."
    if not reason and torch.cuda.get_device_capability() < (9, 0):
        reason = "cuDNN attention pays from compute capability 9.0 (Hopper) on; leave --cp-kernel out."
    return reason


class CudnnKernel(cuda.CudaKernel):
    name = "cudnn"

    def _dense_forward(
        self, part: BlockTensors, options: KernelOptions
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        block = part.block
        if not (block.is_full or block.is_causal):
            return super()._dense_forward(part, options)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (part.query, part.key, part.value))
        out, lse, _, _, _, _, seed, offset, _ = _forward(
            q, k, v, None, True, options.dropout_p, block.is_causal, False, scale=options.softmax_scale
        )
        # lse comes as (batch, heads, rows, 1)
        return out.permute(2, 0, 1, 3), lse.reshape(q.shape[:3]).permute(2, 0, 1), [seed, offset]

    def _dense_backward(self, part: BlockTensors, rows: AttentionRows, options: KernelOptions, state: Any) -> Gradients:
        block = part.block
        if not (block.is_full or block.is_causal):
            return super()._dense_backward(part, rows, options, state)
        read = (rows.grad_out, part.query, part.key, part.value, rows.out)
        dq, dk, dv = _backward(
            *(tensor.permute(1, 2, 0, 3) for tensor in read),
            rows.lse.permute(1, 2, 0).contiguous().unsqueeze(-1),
            *state,
            None,
            None,
            None,
            part.query.shape[0],
            part.key.shape[0],
            options.dropout_p,
            block.is_causal,
            scale=options.softmax_scale,
        )
        return dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)
