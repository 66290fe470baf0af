"""The kernel protocol: one block of attention, forward and backward.

Shapes (sequence first, any strides with a contiguous last dimension)::

    query (nq, batch, heads, dk)   key (nk, batch, kv_heads, dk)   value (nk, batch, kv_heads, dv)
    out, grad_out (nq, batch, heads, dv)   lse (nq, batch, heads), natural log of the sum of exp of the scaled scores
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch

from mindspeed_cp.sequence.blocks import Block

MemoryOrder = Literal["sequence", "heads"]


class KernelOptions(NamedTuple):
    """What stays the same for all blocks of one call."""

    softmax_scale: float
    dropout_p: float = 0.0
    rng_stream: int = 0  # differs between ranks that share torch's seed; kernels with a seed of their own mix it in


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class AttentionKernel(Protocol):
    """Computes one ``blocks.Block``; the tensors are already cut to the block's rows.

    A block is a rectangle, a causal square, or (``native_bands``) a band, in one or many pieces that lie end to end;
    its query i sees its key j when lower <= j - i <= upper, counted within a piece, and every row sees a key.
    ``attention_mask`` (bool, True = masked out, (1 or batch, nq, nk)) further masks a single full rectangle.

    Optional: ``memory_order(dtype)`` returns how tensors should lie in memory, None for any strides. "sequence" makes
    each (seq, batch, heads, dim) contiguous, "heads" makes (seq, dim) of each head of key and value contiguous. What
    comes from an exchange lies so on every rank, its own rows included, because somebody copies them once anyway; so
    does with "sequence" what blocks share, the query and its gradient.
    """

    name: str
    native_bands: bool

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
        options: KernelOptions,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Returns (out, lse, rng): out in the input's or the accumulation dtype, 0 where a row sees no key; lse in the
        accumulation dtype, -inf there; rng is whatever backward needs to draw the same dropout mask, else None."""

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: Block,
        options: KernelOptions,
        rng: Any,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (dq, dk, dv), each with the shape of its input, of the block alone.

        out and lse are those of the whole attention (all blocks merged), cut to the block's query rows; rows that see
        no key anywhere have lse = +inf, so that their probabilities are 0.
        """


def memory_order(kernel: AttentionKernel, dtype: torch.dtype) -> MemoryOrder | None:
    """How this kernel wants tensors of this dtype to lie in memory; None where it does not say."""
    asked = getattr(kernel, "memory_order", None)
    return None if asked is None else asked(dtype)
