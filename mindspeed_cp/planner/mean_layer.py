"""The layer as which a model of several kinds of layers is timed: the mean of them, weighed by their shares."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, replace
from typing import Any, TypeVar

from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.derived import LinearExchange

Candidate = TypeVar("Candidate", bound=Any)  # search.Candidate
OneKind = Callable[[ContextParallelConfig, Problem], Candidate]


def mean_layer(config: ContextParallelConfig, problem: Problem, one_kind: OneKind[Candidate]) -> Candidate:
    """What ``one_kind`` says of each kind of layer, as their mean; the setting is completed by what is fastest for
    layers with a state.
    """
    whole = replace(problem, windowed=None, linear=None)
    found = one_kind(config, whole)
    if problem.windowed is not None:
        window, share = problem.windowed
        found = _mean(found, one_kind(config, replace(whole, sliding_window=(window - 1, 0))), share)
    if problem.linear is None:
        return found
    layer, share = problem.linear
    other = _with_state(config, replace(whole, layer=layer, latent=None), one_kind)
    sent = [(found.intra_bytes, other.intra_bytes), (found.inter_bytes, other.inter_bytes)]
    intra, inter = (round((1 - share) * one + share * more) for one, more in sent)
    mean: Candidate = replace(_mean(found, other, share), config=other.config, intra_bytes=intra, inter_bytes=inter)
    return mean


def _mean(first: Candidate, second: Candidate, share: float) -> Candidate:
    """``first`` with the mean times of layers of which a share is timed as ``second``."""
    forward, backward = (
        type(this)(*((1 - share) * one + share * other for one, other in zip(astuple(this), astuple(that))))
        for this, that in ((first.forward, second.forward), (first.backward, second.backward))
    )
    mean: Candidate = replace(first, forward=forward, backward=backward)
    return mean


def _with_state(config: ContextParallelConfig, problem: Problem, one_kind: OneKind[Candidate]) -> Candidate:
    """A layer with a state by the faster of heads and states; by states alone where there is no head for each rank."""
    ways: tuple[LinearExchange, ...] = ("heads", "state") if config.context_parallel_size > 1 else ("heads",)
    found = []
    for way in ways:
        with suppress(ValueError):
            found.append(one_kind(replace(config, linear_exchange=way), problem))
    return min(found, key=lambda candidate: candidate.seconds)
