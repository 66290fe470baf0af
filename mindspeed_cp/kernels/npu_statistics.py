"""Conversion between the softmax statistics of the NPU operators and lse.

The operators return max and sum as float32 with eight equal lanes. In SBH they are (batch, heads, rows, 8). In TND they
are a (rows, heads, 8) tensor whose memory order depends on the release:

* "rows": rows, then heads; requested by ``softmax_layout="TND"`` if the operator has that argument;
* "heads": heads, then all rows, as the operator's documentation says (NTD);
* "documents": document by document, heads, then the document's rows, as MindSpeed reads them.

The last two sources disagree about operators without the argument, so ``probe_order`` asks the device once.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from mindspeed_cp.sequence.cache import kept_up_to

Statistics = tuple[torch.Tensor, torch.Tensor]  # (max, sum)
StatisticsOrder = Literal["rows", "heads", "documents"]

LANES = 8
# exp(score - LARGE) is 0 for every score; infinity would give NaN if a score is infinite too.
LARGE = 1e30


def row_permutation(
    order: StatisticsOrder, lengths: tuple[int, ...], heads: int, device: torch.device
) -> torch.Tensor | None:
    """LongTensor p: entry (row, head) of a TND call lies at position p[row * heads + head] of the statistics' memory.

    None for the order "rows", where p is the identity.

    Args:
        order: "rows", "heads" or "documents".
        lengths: query rows of each document.
    """
    return None if order == "rows" else _permutation(order, lengths, heads, device)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


@kept_up_to(64 << 20, _num_bytes)
def _permutation(order: StatisticsOrder, lengths: tuple[int, ...], heads: int, device: torch.device) -> torch.Tensor:
    total = sum(lengths)
    index = torch.arange(total * heads, device=device)
    if order == "heads":
        return index.view(heads, total).t().reshape(-1)
    pieces = [piece.view(heads, -1).t() for piece in index.split([length * heads for length in lengths])]
    return torch.cat(pieces).reshape(-1)


def to_lse(softmax_max: torch.Tensor, softmax_sum: torch.Tensor) -> torch.Tensor:
    """Natural-log sum of exp of the scaled scores, float32: lane 0 of the statistics."""
    return softmax_max[..., 0] + torch.log(softmax_sum[..., 0])


def from_lse(lse: torch.Tensor) -> Statistics:
    """(max, sum) with eight lanes that represent ``lse``: the sum is 1. A row without any key (+inf) gets weight 0."""
    softmax_max = lse.float().clamp(max=LARGE).unsqueeze(-1).expand(*lse.shape, LANES).contiguous()
    return softmax_max, _ones(softmax_max.shape, softmax_max.device)


@kept_up_to(64 << 20, _num_bytes)
def _ones(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Cached float32 ones, which the operators only read."""
    with torch.inference_mode(False):
        return torch.ones(shape, device=device)


def probe_order(attention: Callable[..., Statistics], device: torch.device) -> StatisticsOrder:
    """Find the memory order of TND statistics with a call of three tokens whose lse values are all different.

    Args:
        attention: function (query, key, value, lengths) -> (max, sum) of one TND call with scale 1 and no mask.

    Raises:
        ValueError: the order is none of the known ones; the message says what to do.
    """
    lengths, heads = (1, 2), 2
    code = torch.arange(sum(lengths) * heads, dtype=torch.float16, device=device).view(-1, heads, 1)
    query = torch.zeros(sum(lengths), heads, 16, dtype=torch.float16, device=device)
    query[..., :1] = code
    key = torch.zeros_like(query)
    key[..., 0] = 1
    lse = to_lse(*attention(query, key, key, lengths)).reshape(-1)
    documents = torch.tensor(lengths, dtype=torch.float32, device=device)
    # All keys of a document give the same score, so lse is that score plus the log of the document's length.
    expected = code[..., 0].float() + torch.log(documents).repeat_interleave(documents.long()).unsqueeze(1)
    expected = expected.reshape(-1)
    orders: tuple[StatisticsOrder, ...] = ("documents", "heads", "rows")
    for order in orders:
        permutation = row_permutation(order, lengths, heads, device)
        if torch.allclose(lse if permutation is None else lse[permutation], expected, atol=1e-2):
            return order
    raise ValueError(
        "the packed attention statistics of this torch_npu release come in an unknown order; choose "
        "--cp-kernel blockwise, or install a torch_npu whose npu_fusion_attention takes softmax_layout."
    )
