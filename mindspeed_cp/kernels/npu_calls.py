"""The operator calls that compute a block on an NPU: rows, layout, lengths and masks of each; see ``npu``'s table."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from mindspeed_cp.sequence.blocks import Block

MASK_SIZE = 2048  # side of the operator's compressed triangle, for any sequence length
MAX_HEADS = 256  # query heads of one call
MAX_PIECES = 1024  # documents of one TND call


@cache
def compressed_mask(device: torch.device) -> torch.Tensor:
    """Bool (2048, 2048), True above the diagonal: the mask of sparse_mode 2 and 4, shared by all calls on a device."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu_(1)


class Call(NamedTuple):
    """One operator call: the rows of the block that it reads, its layout, and the arguments that describe its mask.

    Args:
        q, k, batch: slices of the block's query rows, key rows and batch entries.
        q_lengths, k_lengths: rows of each piece in TND; None in SBH.
    """

    q: slice
    k: slice
    batch: slice
    q_lengths: tuple[int, ...] | None
    k_lengths: tuple[int, ...] | None
    mask_arguments: dict[str, Any]

    @property
    def layout(self) -> str:
        return "SBH" if self.q_lengths is None else "TND"

    def operand(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """(seq, batch, heads, dim) -> (rows, batch, heads * dim) in SBH, (rows, batch * heads, dim) in TND."""
        part = tensor[rows, self.batch]
        return part.flatten(2) if self.q_lengths is None else part.flatten(1, 2)


def num_heads(query: torch.Tensor, call: Call) -> int:
    """Number of query heads for the operator: in TND, batch is folded into the heads."""
    heads = query.shape[2]
    return heads if call.q_lengths is None else heads * len(range(*call.batch.indices(query.shape[1])))


def cumulative(lengths: tuple[int, ...]) -> list[int]:
    """Cumulative sums without a leading 0, the operator's format of document lengths."""
    return list(accumulate(lengths))


def operator_calls(
    query: torch.Tensor, key: torch.Tensor, block: Block, attention_mask: torch.Tensor | None
) -> Iterator[Call]:
    """The operator calls of one block; together their rows and batch entries cover it exactly once."""
    batch = slice(0, query.shape[1])
    if block.num_pieces == 1 or not (block.is_full or block.is_causal):
        for q, k in block.pieces():
            arguments = _mask_arguments(block, q.stop - q.start, k.stop - k.start, attention_mask, query.device)
            yield Call(q, k, batch, None, None, arguments)
        return
    per_call = max(1, MAX_HEADS // query.shape[2])
    q0, k0 = block.q_offsets[0], block.k_offsets[0]
    arguments = _mask_arguments(block, 0, 0, None, query.device)
    for start in range(0, query.shape[1], per_call):
        for first in range(0, block.num_pieces, MAX_PIECES):
            q_offsets, k_offsets = (
                offsets[first : first + MAX_PIECES + 1] for offsets in (block.q_offsets, block.k_offsets)
            )
            q_lengths, k_lengths = (
                tuple(b - a for a, b in zip(offsets, offsets[1:])) for offsets in (q_offsets, k_offsets)
            )
            yield Call(
                slice(q_offsets[0] - q0, q_offsets[-1] - q0),
                slice(k_offsets[0] - k0, k_offsets[-1] - k0),
                slice(start, min(start + per_call, query.shape[1])),
                q_lengths,
                k_lengths,
                arguments,
            )


def _mask_arguments(
    block: Block, rows: int, cols: int, attention_mask: torch.Tensor | None, device: torch.device
) -> dict[str, Any]:
    """The operator's arguments for the mask of a piece of rows x cols."""
    if attention_mask is not None:
        # (rows, cols), the SS form, is one mask for all batch entries; (batch, 1, rows, cols) is one mask for each.
        shared = attention_mask.shape[0] == 1
        return {"sparse_mode": 1, "atten_mask": attention_mask[0] if shared else attention_mask.unsqueeze(1)}
    if block.is_full:
        return {"sparse_mode": 0}
    if block.is_causal:
        return {"sparse_mode": 2, "atten_mask": compressed_mask(device)}
    # The operator counts both limits from the diagonal through the lower right corner, a block from the upper left.
    shift, unlimited = cols - rows, cols + rows  # not the largest int32, which would overflow in the operator's sums
    assert block.lower is None or shift >= block.lower, "every row of a band sees a key (blocks.plan_blocks)"
    return {
        "sparse_mode": 4,
        "atten_mask": compressed_mask(device),
        "pre_tockens": unlimited if block.lower is None else shift - block.lower,
        "next_tockens": unlimited if block.upper is None else block.upper - shift,
    }


def assembled(
    parts: Sequence[torch.Tensor], rows: Sequence[slice], calls: Sequence[Call], shape: Sequence[int]
) -> torch.Tensor:
    """Assemble the calls' results for their rows and batch entries into one tensor of ``shape``; one part is kept."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(tuple(shape))
    for part, part_rows, call in zip(parts, rows, calls):
        whole[part_rows, call.batch] = part
    return whole
