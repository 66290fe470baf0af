"""Losses of a micro-batch on several ranks: a rank's share of a token count, and a check of the loss that trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isclose, isfinite
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.settings.notices import warn_this_rank

EXACT = 1e-4  # relative tolerance; losses are float32
SECTION = 'the section "Loss normalisation" of docs/megatron.md'


@dataclass(frozen=True)
class Told:
    """What the loss function of one rank returned for a micro-batch.

    Args:
        loss: the loss.
        count: the number of tokens; None if it returned two values, in which case the loss is already a mean.
        value: the reported loss, or None.
        tokens: the number by which ``value``, a sum, must be divided; None if ``value`` is a mean.
    """

    loss: float
    count: float | None
    value: float | None
    tokens: float | None


class Losses:
    """What the Adaptor knows about the losses of a process.

    Attributes:
        asked: whether a loss function has called ``share_of``.
        watched: whether the first loss of the training was checked.
    """

    def __init__(self) -> None:
        self.asked = self.watched = False

    def watch(self, scope: Scope, result: tuple[Any, ...], counts_are_added: bool) -> None:
        """Warn if the first loss is exactly cp times or 1 / cp of the intended loss.

        Every rank of ``scope`` calls it.

        Args:
            result: result of the loss function, (loss, report) or (loss, num_tokens, report).
            counts_are_added: whether Megatron sums num_tokens over these ranks (from 0.13 on).
        """
        if self.watched:
            return
        self.watched = True
        rows = _gathered(scope, result)
        if scope.rank == 0 and (message := self.said(rows, counts_are_added)):
            warn_this_rank(message)

    def said(self, ranks: Sequence[Told], counts_are_added: bool) -> str:
        """The warning about the losses that the ranks returned, "" if nothing is wrong."""
        size, factor = len(ranks), factor_of(ranks, counts_are_added)
        if factor == size:
            return (
                f"the loss that trains is exactly {size} times the loss that the loss function reports: with "
                f"--context-parallel-size {size} each rank holds a part of the tokens, and gradients of (loss, report) "
                "are added over the ranks; divide the sum of this rank's losses by the token count of the whole "
                "sequence, not by this rank's, and report the sum of the ranks' losses. See " + SECTION + "."
            )
        whole = counts_are_added and _alike(ranks) and ranks[0].count is not None
        unsaid = factor is None and whole and ranks[0].loss != 0 and len({row.count for row in ranks}) == 1
        if factor == 1 / size or (unsaid and not self.asked):
            return (
                "the loss function returned the same loss and num_tokens on every context-parallel rank, and Megatron "
                f"adds num_tokens over them: gradients are exactly 1 / {size} of what they are without context "
                "parallelism; return (loss, mindspeed_cp.megatron_adaptor.state().share_of(num_tokens), report) for a "
                "loss of the whole sequence. See " + SECTION + "."
            )
        return ""


def factor_of(ranks: Sequence[Told], counts_are_added: bool) -> float | None:
    """The ratio of the loss that trains to the reported one, if it is exactly 1, cp or 1 / cp; else None."""
    reported = _reported(ranks)
    if not reported or not isfinite(reported):
        return None
    size = len(ranks)
    ratio = _trained(ranks, counts_are_added) / reported
    return next((factor for factor in (1.0, float(size), 1 / size) if isclose(ratio, factor, rel_tol=EXACT)), None)


def _trained(ranks: Sequence[Told], counts_are_added: bool) -> float:
    """The loss whose gradient is the sum of the ranks' gradients.

    A loss that is equal on all ranks was computed from gathered tensors, whose gradient is each rank's own part.
    """
    if ranks[0].count is not None and not counts_are_added:
        ranks = [Told(row.loss / max(row.count or 0.0, 1.0), None, row.value, row.tokens) for row in ranks]
    loss = ranks[0].loss if _alike(ranks) else sum(row.loss for row in ranks)
    return loss / max(sum(row.count or 0.0 for row in ranks), 1.0) if ranks[0].count is not None else loss


def _reported(ranks: Sequence[Told]) -> float | None:
    values = [row.value for row in ranks if row.value is not None]
    if len(values) < len(ranks):
        return None
    tokens = [row.tokens for row in ranks if row.tokens is not None]
    if not tokens:
        return sum(values) / len(values)
    return sum(values) / sum(tokens) if sum(tokens) else None


def _alike(ranks: Sequence[Told]) -> bool:
    return len({row.loss for row in ranks}) == 1


def _gathered(scope: Scope, result: tuple[Any, ...]) -> list[Told]:
    """What the loss function returned on every rank of ``scope``, in rank order."""
    loss, report = result[0], result[-1]
    given = [loss, result[1] if len(result) == 3 else None, *_first_of(report)]
    row = torch.stack([_number(value, loss.device) for value in given])
    rows = [torch.empty_like(row) for _ in range(scope.size)]
    dist.all_gather(rows, row, group=scope.group)
    return [Told(values[0], *(None if value != value else value for value in values[1:])) for values in
            (row.tolist() for row in rows)]  # fmt: skip


def _first_of(report: Any) -> tuple[Any, Any]:
    """(value, tokens) of the first loss in a report."""
    value = next(iter(report.values()), None) if isinstance(report, dict) else None
    if isinstance(value, torch.Tensor) and value.numel() in (1, 2):
        return (value.view(-1)[0], value.view(-1)[1] if value.numel() == 2 else None)
    if isinstance(value, tuple) and len(value) == 2:  # until 0.12
        return value
    return (value if isinstance(value, (int, float)) else None), None


def _number(value: Any, device: torch.device) -> torch.Tensor:
    """``value`` as a float32 scalar, NaN for None."""
    if isinstance(value, torch.Tensor):
        return value.detach().sum().to(device, torch.float32)
    return torch.tensor(float("nan") if value is None else float(value), device=device)


def share_of(count: Any, scope: Scope) -> Any:
    """This rank's integer share of ``count``; the shares of ``scope``'s ranks sum to it. A tensor stays a tensor."""
    if scope.alone or not counts_are_added():
        return count
    return count // scope.size + (scope.rank < count % scope.size)


@cache
def counts_are_added() -> bool:
    """Whether Megatron sums the token counts of a loss function over the context-parallel ranks.

    It does from 0.13 on; before, each rank returns the count of the whole sequence. Only the version tells.
    """
    from megatron.core import __version__

    major, minor, *_ = __version__.split(".")
    return (int(major), int(minor)) >= (0, 13)
