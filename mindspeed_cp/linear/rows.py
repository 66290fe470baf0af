"""Exchange rows of a sequence: from any layout to any other, and the rows before a rank's own.

s: rows that a rank holds, w: rows that it needs; positions are global.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.link import Link
from mindspeed_cp.kernels.base import accumulation_dtype
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import Runs, cut, length, offsets


@dataclass(frozen=True)
class RowPlan:
    """Which rows each rank receives from which rank.

    Args:
        pieces: per rank, (source, first row, last row + 1) in the order in which it needs them; rows are indices into
            the source's rows.
        held: per rank, number of rows that it holds.
    """

    pieces: tuple[tuple[tuple[int, int, int], ...], ...]
    held: tuple[int, ...]

    @property
    def moves(self) -> bool:
        """Whether any rank needs other rows than its own, or in another order."""
        return any(
            mine != (((rank, 0, held),) if held else ())
            for rank, (mine, held) in enumerate(zip(self.pieces, self.held))
        )

    def wanted_by(self, rank: int) -> int:
        return sum(stop - start for _, start, stop in self.pieces[rank])

    def sent(self, source: int, target: int) -> tuple[tuple[int, int], ...]:
        """Rows of ``source`` that ``target`` needs, in the target's order."""
        return tuple((start, stop) for rank, start, stop in self.pieces[target] if rank == source)

    def places(self, source: int, target: int) -> tuple[tuple[int, int], ...]:
        """Where these rows are among all rows that ``target`` needs."""
        ends = offsets(stop - start for _, start, stop in self.pieces[target])
        return tuple((ends[i], ends[i + 1]) for i, (rank, _, _) in enumerate(self.pieces[target]) if rank == source)


def plan_rows(held: tuple[Runs, ...], wanted: tuple[Runs, ...]) -> RowPlan:
    """The plan by which every rank gets the rows that it needs.

    Args:
        held: per rank, runs of global positions; together they hold every position once.
        wanted: per rank, runs of needed positions; several ranks may need the same position.
    """
    segments = []
    for rank, runs in enumerate(held):
        for (start, stop), row in zip(runs, offsets(stop - start for start, stop in runs)):
            segments.append((start, stop, rank, row))
    segments.sort()

    def pieces(runs: Runs) -> tuple[tuple[int, int, int], ...]:
        found: list[tuple[int, int, int]] = []
        for low, high in runs:
            for start, stop, rank, row in segments:
                first, last = max(start, low), min(stop, high)
                if first >= last:
                    continue
                piece = rank, row + first - start, row + last - start
                if found and found[-1][0] == rank and found[-1][2] == piece[1]:
                    piece = rank, found.pop()[1], piece[2]
                found.append(piece)
        return tuple(found)

    return RowPlan(tuple(map(pieces, wanted)), tuple(map(length, held)))


@lru_cache(maxsize=64)
def contiguous_parts(layout: SequenceLayout) -> SequenceLayout:
    """The same sequence with one contiguous part per rank, in rank order; ``layout`` itself if it is like that."""
    parts = tuple(cut(((0, layout.seq_len),), layout.cp_size))
    one_each = all(len(runs) == 1 for runs in layout.all_runs)
    if one_each and sorted(layout.all_runs) == list(layout.all_runs):
        return layout  # parts may be uneven
    return SequenceLayout(parts, layout.ulysses_degree, "contiguous")


@lru_cache(maxsize=64)
def conversion(before: SequenceLayout, after: SequenceLayout) -> RowPlan:
    """The plan that converts one layout to another."""
    return plan_rows(before.all_runs, after.all_runs)


@lru_cache(maxsize=64)
def rows_before(parts: SequenceLayout, count: int, documents: tuple[int, ...]) -> RowPlan:
    """The plan for the rows before each rank's part: ``count`` rows, or fewer if their document begins there.

    Args:
        parts: one run per rank, in rank order.
        documents: boundaries, (0, length) for a single document.
    """
    wanted = []
    for ((start, _),) in parts.all_runs:
        begins = max(end for end in documents if end <= start)
        wanted.append(((max(begins, start - count), start),) if begins < start else ())
    return plan_rows(parts.all_runs, tuple(wanted))


@lru_cache(maxsize=64)
def whole_sequence(layout: SequenceLayout) -> RowPlan:
    """The plan by which every rank gets all rows, in the order of the sequence."""
    return plan_rows(layout.all_runs, (((0, layout.seq_len),),) * layout.cp_size)


def exchange_rows(tensor: torch.Tensor, plan: RowPlan, link: Link, purpose: str) -> torch.Tensor:
    """(s, ...) -> (w, ...), the rows that this rank needs; differentiable and collective.

    The gradient of a row that several ranks received is the sum of their gradients.
    """
    if not plan.moves:
        return tensor
    rows: torch.Tensor = _ExchangeRows.apply(tensor, plan, link, purpose)
    return rows


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, plan: RowPlan, link: Link, purpose: str) -> torch.Tensor:
        ctx.plan, ctx.link, ctx.purpose = plan, link, purpose
        me = link.rank
        rows = tensor.new_empty((plan.wanted_by(me), *tensor.shape[1:]))
        sends = [(rank, _slices(tensor, plan.sent(me, rank))) for rank in link.peers if plan.sent(me, rank)]
        receives = [(rank, _slices(rows, plan.places(rank, me))) for rank in link.peers if plan.sent(rank, me)]
        pending = link.exchange(sends, receives, purpose)
        for row, place in zip(_slices(tensor, plan.sent(me, me)), _slices(rows, plan.places(me, me))):
            place.copy_(row)
        pending.wait()
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        plan, link, me = ctx.plan, ctx.link, ctx.link.rank
        found = grad.new_zeros((plan.held[me], *grad.shape[1:]), dtype=accumulation_dtype(grad.dtype))
        returned = {rank: _room(grad, plan.sent(me, rank)) for rank in link.peers if plan.sent(me, rank)}
        sends = [(rank, _slices(grad, plan.places(rank, me))) for rank in link.peers if plan.sent(rank, me)]
        pending = link.exchange(sends, list(returned.items()), f"d{ctx.purpose}")
        for row, place in zip(_slices(found, plan.sent(me, me)), _slices(grad, plan.places(me, me))):
            row.add_(place)
        pending.wait()
        for rank, received in returned.items():
            for row, part in zip(_slices(found, plan.sent(me, rank)), received):
                row.add_(part)
        return found.to(grad.dtype), None, None, None


def _slices(tensor: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    return [tensor[start:stop] for start, stop in ranges]


def _room(like: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    return [like.new_empty((stop - start, *like.shape[1:])) for start, stop in ranges]
