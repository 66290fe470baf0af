"""tensor_a2a_cp2hp and tensor_a2a_hp2cp of Megatron and MindSpeed, for any layout of the batch.

Layers of frameworks call them with a group and this rank's part of a sequence, or of one packed document.
s: tokens of this rank, S: tokens of the whole sequence or document, h: features, cp: ranks.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_cp.comm.head_exchange import HeadExchange
from mindspeed_cp.comm.sequence_exchange import Part, SequenceExchange
from mindspeed_cp.megatron.batches import record_of_length
from mindspeed_cp.megatron.foreign import of_kind
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.sequence.layout import SequenceLayout

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor


def tensor_a2a_cp2hp(
    adaptor: "Adaptor",
    tensor: torch.Tensor,
    seq_dim: int,
    head_dim: int,
    cp_group: Any,
    split_sections: Sequence[int] | None = None,
    undo_attention_load_balancing: bool = True,
) -> torch.Tensor:
    """(s, b, h) -> (S, b, h / cp), this rank's share of the features of each section.

    Args:
        split_sections: widths of sections of the features that are split separately; None for one section.
        undo_attention_load_balancing: whether the result is in sequence order; else it is in rank order.
    """
    dims = seq_dim, head_dim
    return _exchanged(adaptor, tensor, dims, cp_group, split_sections, undo_attention_load_balancing, to_sequence=True)


def tensor_a2a_hp2cp(
    adaptor: "Adaptor",
    tensor: torch.Tensor,
    seq_dim: int,
    head_dim: int,
    cp_group: Any,
    split_sections: Sequence[int] | None = None,
    redo_attention_load_balancing: bool = True,
) -> torch.Tensor:
    """(S, b, h / cp) -> (s, b, h), the inverse; ``split_sections`` are widths of this rank's shares."""
    dims = seq_dim, head_dim
    return _exchanged(adaptor, tensor, dims, cp_group, split_sections, redo_attention_load_balancing, to_sequence=False)


def _exchanged(
    adaptor: "Adaptor",
    tensor: torch.Tensor,
    dims: tuple[int, int],
    cp_group: Any,
    sections: Sequence[int] | None,
    in_order: bool,
    *,
    to_sequence: bool,
) -> torch.Tensor:
    """``in_order``: the whole sequence is in its own order; else as the ranks hold it, one after another."""
    scope = adaptor.scopes.of(cp_group)
    if scope.alone:
        return tensor
    if tensor.dim() != 3 or dims not in ((0, -1), (0, 2)):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} with seq_dim {dims[0]} and head_dim {dims[1]} cannot be "
            "exchanged; pass (sequence, batch, features) with seq_dim 0 and head_dim -1."
        )
    here = 1 if to_sequence else scope.size  # how often the features here make up h
    widths = [width * here for width in ([tensor.size(-1)] if sections is None else sections)]
    parts = _parts(tensor.size(-1) * here, widths, scope.size)
    heads = [part.num_heads // here for part in parts]
    pieces = tensor.split([count * part.dim for count, part in zip(heads, parts)], dim=-1)
    layout = layout_of_rows(adaptor, scope, tensor.size(0), scope.rank if to_sequence else None)
    exchange = HeadExchange(exchange_of(scope, layout if in_order else _end_to_end(layout)), parts)
    travel = exchange.to_sequence if to_sequence else exchange.to_heads
    found = travel(*(piece.unflatten(-1, (count, part.dim)) for piece, count, part in zip(pieces, heads, parts)))
    return torch.cat([piece.flatten(2) for piece in found], dim=-1)


def exchange_of(scope: Scope, layout: SequenceLayout) -> SequenceExchange:
    """The exchange of heads over all ranks of a scope that hold a sequence in ``layout``."""
    assert scope.groups.cp is not None, "one rank exchanges nothing"
    return SequenceExchange(scope.groups.cp, layout.all_runs, scope.config.alltoall)


def _parts(width: int, widths: list[int], size: int) -> list[Part]:
    """Each section as one head per rank."""
    if any(each % size for each in widths) or sum(widths) != width:
        raise ValueError(
            f"sections {widths} of {width} features must add up to them, and each must be divisible by the "
            f"{size} context-parallel ranks; use --cp-linear-exchange state, or fewer ranks."
        )
    return [Part("heads", size, each // size, tuple(slice(r, r + 1) for r in range(size))) for each in widths]


def layout_of_rows(adaptor: "Adaptor", scope: Scope, rows: int, rank: int | None) -> SequenceLayout:
    """The layout of a sequence of which ``rank`` holds ``rows`` tokens, or of ``rows`` tokens if ``rank`` is None."""
    record = adaptor.running_in(scope)
    if record is None:
        return adaptor.layout(rows, scope=scope) if rank is None else record_of_length(adaptor, scope, rows).layout
    layout = record.layout
    if rows == (layout.seq_len if rank is None else layout.length(rank)):
        return layout
    total = rows if rank is None else rows * scope.size
    if layout.kind != "document_zigzag" or total % (2 * scope.size):
        raise ValueError(
            f"{rows} tokens are exchanged, and the batch has {layout.seq_len} in the layout {layout.kind}; pass a "
            "rank's part of the whole sequence, or one packed document of the layout document_zigzag."
        )
    return of_kind(scope.config, "zigzag", total)


def _end_to_end(layout: SequenceLayout) -> SequenceLayout:
    """A contiguous layout with the same lengths, for a sequence that is in rank order instead of sequence order."""
    ends = [0, *accumulate(layout.length(rank) for rank in range(layout.cp_size))]
    return SequenceLayout(tuple(((low, high),) for low, high in zip(ends, ends[1:])), layout.ulysses_degree)
