"""Layers of Megatron that need one contiguous part of the sequence on each rank, whatever the layout of the batch.

s: tokens of this rank, b: batch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mindspeed_cp.linear.parts import OwnPart
from mindspeed_cp.linear.recurrence import Convolution, Documents, causal_convolution
from mindspeed_cp.linear.rows import contiguous_parts, conversion, exchange_rows
from mindspeed_cp.megatron.records import MicroBatch

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

Rows = Callable[[torch.Tensor], torch.Tensor]


class Inner(NamedTuple):
    """The result of a layer's computation between its projections.

    Args:
        rows: (s, b, width), input of the last projection.
        done: called with the output of the last projection.
    """

    rows: torch.Tensor
    done: Callable[[torch.Tensor], None] = lambda out: None


class Move(NamedTuple):
    """The exchanges of rows to the layout that a layer needs, and back."""

    there: Rows
    back: Rows


STAY = Move(lambda rows: rows, lambda rows: rows)


def through(
    module: Any,
    hidden: torch.Tensor,
    compute: Callable[[torch.Tensor], Inner],
    around: Move = STAY,
    inside: Move = STAY,
) -> tuple[Any, Any]:
    """Run a layer with ``in_proj`` and ``out_proj``, moving its rows outside of its projections or between them.

    Returns:
        its output and the bias of its last projection.
    """
    inner = compute(inside.there(module.in_proj(around.there(hidden))[0]))
    out, bias = module.out_proj(inside.back(inner.rows))
    inner.done(out)
    return around.back(out), bias


def by_parts(
    adaptor: "Adaptor",
    record: MicroBatch,
    documents: Documents,
    module: Any,
    hidden: torch.Tensor,
    compute: Callable[[torch.Tensor, OwnPart], Inner],
) -> tuple[Any, Any]:
    """Run ``through`` for a layer that computes one part of the sequence on each rank; ``compute`` gets that part."""
    assert record.scope is not None and record.scope.groups.cp is not None, "one rank uses Megatron's own function"
    layout, link = record.layout, record.scope.groups.cp
    parts = contiguous_parts(layout)
    plans = conversion(layout, parts), conversion(parts, layout)
    move = Move(*(partial(exchange_rows, plan=plan, link=link, purpose="tokens") for plan in plans))
    part = OwnPart(link, parts, documents)

    def computed(projected: torch.Tensor) -> Inner:
        return compute(projected, part)

    if module.config.sequence_parallel:  # whose rows are gathered by the first projection
        return through(module, hidden, computed, inside=move)
    with adaptor.running(replace(record, layout=parts, moved_from=layout)):
        return through(module, hidden, computed, around=move)


def documents_of(adaptor: "Adaptor", params: Any, seq_len: int) -> Documents:
    """Boundaries at which a state restarts: those of packed documents, padding included, as in Megatron.

    Args:
        params: PackedSeqParams in thd, None for whole sequences.
    """
    if params is None:
        return 0, seq_len
    ends: Documents = adaptor.boundaries.padded(params)
    return ends if ends[-1] == seq_len else (*ends, seq_len)  # the rest is a separate document


def torch_convolution(activation: Rows) -> Convolution:
    """Torch's convolution, followed by the activation."""
    return lambda *arguments: activation(causal_convolution(*arguments))


def dao_convolution(function: Any, activation: str) -> Convolution:
    """The convolution of the package causal-conv1d, document by document."""

    def convolve(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: Documents
    ) -> torch.Tensor:
        found = [
            function(x=rows[:, low:high].transpose(1, 2).contiguous(), weight=weight, bias=bias, activation=activation)
            for low, high in zip(documents, documents[1:])
        ]
        return torch.cat(found, dim=-1).transpose(1, 2)

    return convolve
