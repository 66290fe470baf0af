"""The interface of attention kernels, which compute one block of attention, forward and backward.

Shapes (sequence first, any strides with a contiguous last dimension)::

    query (nq, batch, heads, dk)   key (nk, batch, kv_heads, dk)   value (nk, batch, kv_heads, dv)
    out, grad_out (nq, batch, heads, dv)   lse (nq, batch, heads), natural log of the sum of exp of the scaled scores
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from mindspeed_cp.kernels.merge import merge_attention
from mindspeed_cp.sequence.blocks import Block

MemoryOrder = Literal["sequence", "heads"]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
T = TypeVar("T")


class KernelOptions(NamedTuple):
    """Options that are the same for all blocks of one call.

    Args:
        rng_stream: differs between ranks that share torch's seed; kernels that seed their dropout mix it into the seed.
        fused_merge: results are merged by the kernel's own ``merge``, which may need their statistics.
    """

    softmax_scale: float
    dropout_p: float = 0.0
    rng_stream: int = 0
    fused_merge: bool = False


@dataclass(frozen=True, eq=False)
class BlockTensors:
    """A block and its tensors, already sliced to the block's rows.

    Query i sees key j if lower <= j - i <= upper; both indices are relative to a piece of the block.

    Args:
        query, key, value: (nq, batch, heads, dk), (nk, batch, kv_heads, dk), (nk, batch, kv_heads, dv).
        attention_mask: bool, True = masked out, (1 or batch, nq, nk); only with a single full rectangle.
    """

    block: Block
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None = None

    def cut(self, q: slice, k: slice, block: Block | None = None) -> "BlockTensors":
        """The query rows ``q`` and key rows ``k`` of this block, as ``block`` or with the same limits."""
        return BlockTensors(block or self.block, self.query[q], self.key[k], self.value[k])

    def with_tensors(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> "BlockTensors":
        return BlockTensors(self.block, query, key, value, self.attention_mask)


class BlockResult(NamedTuple):
    """The result of forward for one block.

    Args:
        out: in the input's or the accumulation dtype, 0 where a row sees no key.
        lse: in the accumulation dtype, -inf where a row sees no key.
        saved: whatever else backward needs, such as the random state that reproduces the dropout mask.
        statistics: ``lse`` in the kernel's own form, read only by its ``merge``.
    """

    out: torch.Tensor
    lse: torch.Tensor
    saved: Any = None
    statistics: Any = None


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Input of backward: out and lse of the whole attention (all blocks merged) for some query rows, and the gradient.

    Args:
        grad_out, out: (nq, batch, heads, dv).
        lse: (nq, batch, heads); +inf for a row that sees no key in any block, so that its probabilities are 0.
    """

    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """The value of ``make()``, computed once for all blocks that share these rows."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def cut(self, rows: slice) -> "AttentionRows":
        return AttentionRows(self.grad_out[rows], self.out[rows], self.lse[rows])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The parts, one after the other in ``dim``; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class AttentionKernel(ABC):
    """Computes one ``blocks.Block``: a rectangle, a causal square, or (``native_bands``) a band.

    A block is one piece or several contiguous pieces; every row sees a key.

    Attributes:
        name: the value of --cp-kernel that selects it.
        native_bands: whether it computes bands, blocks with two limits.
        has_fused_merge: whether ``merge`` is a fused operator.
    """

    name: str
    native_bands: bool = False
    has_fused_merge: bool = False

    @abstractmethod
    def forward(self, tensors: BlockTensors, options: KernelOptions) -> BlockResult:
        """Attention of the block alone."""

    @abstractmethod
    def backward(self, tensors: BlockTensors, rows: AttentionRows, options: KernelOptions, saved: Any) -> Gradients:
        """(dq, dk, dv), each with the shape of its input, of the block alone.

        Args:
            rows: out, lse and gradient of the whole attention, sliced to the block's query rows.
            saved: ``saved`` of forward's result.
        """

    def memory_order(self, dtype: torch.dtype) -> MemoryOrder | None:
        """The preferred memory layout of tensors of this dtype; None accepts any strides.

        "sequence" makes each (seq, batch, heads, dim) contiguous, "heads" makes (seq, dim) of each head of key and
        value contiguous. Exchanges copy keys and values once anyway, the rank's own rows included, and write them in
        this layout; with "sequence" the query and its gradient, which blocks share, are made contiguous too.
        """
        return None

    def merge(self, out: torch.Tensor, lse: torch.Tensor, statistics: Any, block: BlockResult) -> Any:
        """Merge a block's result into (out, lse) in place, as ``merge_attention`` does.

        Args:
            statistics: what the previous merge returned for exactly these rows, or ``statistics`` of the first block;
                None if unknown.

        Returns:
            The statistics of the merged rows, or None.
        """
        merge_attention(out, lse, block.out, block.lse)
        return None
