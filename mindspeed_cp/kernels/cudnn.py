"""cuDNN attention for full and causal blocks, often the faster one on Hopper; everything else as in the CUDA kernel.

Chosen by --cp-kernel cudnn only: ``scripts/bench_kernels.py`` tells which is faster on a machine.
Tested against the operators' schemas on the CPU; not yet run on a GPU.
"""

import torch

from mindspeed_cp.kernels import cuda

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def build():
    return CudnnKernel()


def unavailable():
    """Why this machine cannot use cuDNN attention; "" when it can."""
    reason = cuda.unavailable()
    if not reason and not torch.backends.cudnn.is_available():
        reason = "this build of torch has no cuDNN; leave --cp-kernel out."
    if not reason and torch.cuda.get_device_capability() < (9, 0):
        reason = "cuDNN attention pays from compute capability 9.0 (Hopper) on; leave --cp-kernel out."
    return reason


class CudnnKernel(cuda.CudaKernel):
    name = "cudnn"

    def _dense_forward(self, query, key, value, block, options):
        if not (block.is_full or block.is_causal):
            return super()._dense_forward(query, key, value, block, options)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out, lse, _, _, _, _, seed, offset, _ = _forward(
            q, k, v, None, True, options.dropout_p, block.is_causal, False, scale=options.softmax_scale
        )
        # lse comes as (batch, heads, rows, 1)
        return out.permute(2, 0, 1, 3), lse.reshape(q.shape[:3]).permute(2, 0, 1), [seed, offset]

    def _dense_backward(self, grad_out, query, key, value, out, lse, block, options, rng):
        if not (block.is_full or block.is_causal):
            return super()._dense_backward(grad_out, query, key, value, out, lse, block, options, rng)
        tensors = (tensor.permute(1, 2, 0, 3) for tensor in (grad_out, query, key, value, out))
        grads = _backward(
            *tensors,
            lse.permute(1, 2, 0).contiguous().unsqueeze(-1),
            *rng,
            None,
            None,
            None,
            query.shape[0],
            key.shape[0],
            options.dropout_p,
            block.is_causal,
            scale=options.softmax_scale,
        )
        return tuple(grad.permute(2, 0, 1, 3) for grad in grads)
