"""Prevents a second exchange: attention inside UlyssesContextAttention must not exchange again.

A local attention may be wrapped in anything (a subclass, another module, functools.partial, a checkpoint), so it cannot
be recognised from outside. Instead, when it runs, it checks whether it is inside an exchange.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import split_sizes
from mindspeed_cp.settings.config import ContextParallelConfig


@dataclass(frozen=True)
class Exchanged:
    """An exchange around a local attention, which gets the concatenated tokens of all these ranks.

    Args:
        global_ranks: the ranks that share the sequence, in the order in which their tokens are concatenated.
        rank: this rank's index among them.
    """

    global_ranks: tuple[int, ...]
    rank: int

    def local_length(self, length: int) -> int:
        """Number of tokens that this rank held before the exchange, if the local attention gets ``length`` tokens."""
        return split_sizes(length, len(self.global_ranks))[self.rank]

    def alone(
        self, config: ContextParallelConfig, groups: ContextParallelGroups, layout: SequenceLayout
    ) -> tuple[ContextParallelConfig, ContextParallelGroups, SequenceLayout]:
        """(config, groups, layout) for attention inside the exchange: one rank that holds all tokens in rank order.

        Args:
            config, groups, layout: those with which attention would exchange itself.

        Raises:
            ValueError: the exchange was over other ranks than attention's own.
        """
        if groups.global_ranks != self.global_ranks:
            raise ValueError(
                f"UlyssesContextAttention has exchanged over ranks {list(self.global_ranks)}, and the attention inside "
                f"it is context-parallel over ranks {list(groups.global_ranks)}; pass UlyssesContextAttention the "
                "context-parallel group (get_context_parallel_group()), or leave it out: that attention exchanges "
                "itself."
            )
        single = ContextParallelConfig(attention_mask_type=config.attention_mask_type)
        mine = self.global_ranks[self.rank]
        return single, ContextParallelGroups(single.hierarchy, 0, (mine,)), layout.joined()


_now: ContextVar[Exchanged | None] = ContextVar("exchange around the local attention", default=None)
# Attention modules that ran inside an exchange; a checkpoint runs them again in the backward pass, outside of it.
_inside: WeakKeyDictionary[torch.nn.Module, Exchanged] = WeakKeyDictionary()


@contextmanager
def exchanging(around: Exchanged) -> Iterator[None]:
    """Context manager in which attention knows that it is inside ``around``."""
    token = _now.set(around)
    try:
        yield
    finally:
        _now.reset(token)


def exchange_around(attention: torch.nn.Module) -> Exchanged | None:
    """The exchange around this call of ``attention``, None if it gets only its own rank's tokens.

    An attention that can exchange calls this first on every call. If it has run inside an exchange, it also counts as
    inside when a checkpoint runs it again in the backward pass.
    """
    around = _now.get()
    if around is not None:
        _inside[attention] = around
        return around
    recomputes = torch._C._current_graph_task_id() != -1
    return _inside.get(attention) if recomputes else None
