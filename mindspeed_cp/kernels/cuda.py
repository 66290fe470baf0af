"""The NVIDIA kernel: torch's own flash attention operators, nothing to install.

A single block is a dense call, (batch, seq, heads, dim) as a view of the sequence-first tensors. Packed pieces are one
varlen call, (rows, batch * heads, dim): batch is folded into the heads, so that all batch entries share one cu_seqlens.
A band is a window. GQA and dropout are the operator's own. dk != dv, and head dimensions that 8 does not divide, are
padded with zeros, which add nothing to a score and nothing to an output.

float32 and float64, dense masks and head dimensions above 256 take the blockwise path, announced once.
Where torch.nn.attention has activated FlashAttention-3, the same operators run it.

Tested against the operators' schemas on the CPU; not yet run on a GPU.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from mindspeed_cp.kernels.blockwise import BlockwiseKernel
from mindspeed_cp.kernels.random_stream import random_stream
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.settings.notices import warn_rank0

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def build():
    return CudaKernel()


def unavailable():
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


class CudaKernel:
    name = "cuda"
    native_bands = True

    def __init__(self):
        self._blockwise = BlockwiseKernel()

    def forward(self, query, key, value, block, options, attention_mask=None):
        if self._needs_blockwise(query, value, attention_mask):
            return self._blockwise.forward(query, key, value, block, options, attention_mask)
        head_dim = value.shape[-1]
        query, key, value = _padded((query, key, value), query.shape[-1], head_dim)
        with random_stream(query.device, options.rng_stream if options.dropout_p else 0):
            parts = [self._forward_part(query[q], key[k], value[k], part, options) for q, k, part in _parts(block)]
        outs, lses, rngs = zip(*parts)
        return _joined(outs)[..., :head_dim], _joined(lses), rngs

    def backward(self, grad_out, query, key, value, out, lse, block, options, rng, attention_mask=None):
        if self._needs_blockwise(query, value, attention_mask):
            return self._blockwise.backward(grad_out, query, key, value, out, lse, block, options, rng, attention_mask)
        dims = query.shape[-1], key.shape[-1], value.shape[-1]
        out, grad_out = out.to(query.dtype), grad_out.to(query.dtype)
        query, key, value, out, grad_out = _padded((query, key, value, out, grad_out), *dims[1:])
        grads = [
            self._backward_part(grad_out[q], query[q], key[k], value[k], out[q], lse[q], part, options, part_rng)
            for (q, k, part), part_rng in zip(_parts(block), rng, strict=True)
        ]
        return tuple(_joined(part)[..., :dim] for part, dim in zip(zip(*grads), dims))

    def _needs_blockwise(self, query, value, attention_mask):
        head_dim = max(query.shape[-1], value.shape[-1])
        reason = None
        if query.dtype not in DTYPES:
            reason = f"{query.dtype} tensors"
        elif attention_mask is not None:
            reason = "a dense attention mask"
        elif head_dim > MAX_HEAD_DIM:
            reason = f"a head dimension of {head_dim}"
        if reason:
            warn_rank0(
                f"--cp-kernel {self.name}: flash attention does not take {reason}; the exact and slower "
                "blockwise kernel computes it (--cp-kernel blockwise chooses it outright)."
            )
        return reason is not None

    def _forward_part(self, query, key, value, block, options):
        if block.num_pieces > 1:
            return _varlen_forward(query, key, value, block, options)
        return self._dense_forward(query, key, value, block, options)

    def _backward_part(self, grad_out, query, key, value, out, lse, block, options, rng):
        if block.num_pieces > 1:
            return _varlen_backward(grad_out, query, key, value, out, lse, block, options, rng)
        return self._dense_backward(grad_out, query, key, value, out, lse, block, options, rng)

    def _dense_forward(self, query, key, value, block, options):
        """(out, lse, rng) of one piece; lse is (batch, heads, rows) in the operator."""
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out, lse, *rng, _ = _forward(
            q,
            k,
            v,
            None,
            None,
            q.shape[1],
            k.shape[1],
            options.dropout_p,
            block.is_causal,
            False,
            scale=options.softmax_scale,
            **_window(block, q.shape[1], k.shape[1]),
        )
        return out.transpose(0, 1), lse.permute(2, 0, 1), rng

    def _dense_backward(self, grad_out, query, key, value, out, lse, block, options, rng):
        tensors = (tensor.transpose(0, 1) for tensor in (grad_out.contiguous(), query, key, value, out.contiguous()))
        # The operator reads lse as contiguous memory, whatever its strides say.
        grads = _backward(
            *tensors,
            lse.permute(1, 2, 0).contiguous(),
            None,
            None,
            query.shape[0],
            key.shape[0],
            options.dropout_p,
            block.is_causal,
            *rng,
            scale=options.softmax_scale,
            **_window(block, query.shape[0], key.shape[0]),
        )
        return tuple(grad.transpose(0, 1) for grad in grads)


def _varlen_forward(query, key, value, block, options):
    """(out, lse, rng) of packed pieces; lse is (batch * heads, rows) in the operator."""
    tensors = (tensor.flatten(1, 2) for tensor in (query, key, value))
    out, lse, *rng, _ = _forward(
        *tensors, *_lengths(block, query.device), options.dropout_p, block.is_causal, False, scale=options.softmax_scale
    )
    return out.view(*query.shape[:3], -1), lse.t().reshape(query.shape[:3]), rng


def _varlen_backward(grad_out, query, key, value, out, lse, block, options, rng):
    tensors = (tensor.flatten(1, 2) for tensor in (grad_out.contiguous(), query, key, value, out.contiguous()))
    grads = _backward(
        *tensors,
        lse.flatten(1).t().contiguous(),
        *_lengths(block, query.device),
        options.dropout_p,
        block.is_causal,
        *rng,
        scale=options.softmax_scale,
    )
    return tuple(grad.view(like.shape) for grad, like in zip(grads, (query, key, value)))


def _lengths(block, device):
    """cu_seqlens of queries and keys, and the longest piece of each."""
    longest = (max(b - a for a, b in zip(offsets, offsets[1:])) for offsets in (block.q_offsets, block.k_offsets))
    return _cu_seqlens(block.q_offsets, device), _cu_seqlens(block.k_offsets, device), *longest


@lru_cache(maxsize=256)
def _cu_seqlens(offsets, device):
    return torch.tensor([offset - offsets[0] for offset in offsets], dtype=torch.int32, device=device)


def _parts(block):
    """(query rows, key rows, block) of each operator call: the block itself, or every piece of a band by itself."""
    if block.num_pieces == 1 or block.is_full or block.is_causal:
        return [(slice(None), slice(None), block)]
    return [(q, k, Block((q.start, q.stop), (k.start, k.stop), block.lower, block.upper)) for q, k in block.pieces()]


def _window(block, rows, cols):
    """Window arguments of a band; the operator counts from the diagonal that ends in the lower right corner."""
    if block.is_full or block.is_causal:
        return {}
    shift = cols - rows
    assert block.lower is None or shift >= block.lower, "every row of a band sees a key (blocks.plan_blocks)"
    return {
        "window_size_left": -1 if block.lower is None else shift - block.lower,
        "window_size_right": -1 if block.upper is None else block.upper - shift,
    }


def _padded(tensors, dk, dv):
    """The tensors with zeros up to one head dimension that the operator takes."""
    width = -(-max(dk, dv) // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
    return [tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]


def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)
