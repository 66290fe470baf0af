"""Who exchanges: what UlyssesContextAttention has exchanged already, the attention inside it must not exchange again.

A local attention may be wrapped in anything (a subclass, another module, functools.partial, a checkpoint), so that it
cannot be recognised from outside. It asks instead, when it runs, whether an exchange is around it.
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
    """An exchange around a local attention, which sees the tokens of all these ranks one after another.

    Args:
        global_ranks: the ranks that share the sequence, in the order in which their tokens follow one another.
        rank: this rank's place among them.
    """

    global_ranks: tuple[int, ...]
    rank: int

    def local_length(self, length: int) -> int:
        """How many of the ``length`` tokens that the local attention sees this rank held before the exchange."""
        return split_sizes(length, len(self.global_ranks))[self.rank]

    def alone(
        self, config: ContextParallelConfig, groups: ContextParallelGroups, layout: SequenceLayout
    ) -> tuple[ContextParallelConfig, ContextParallelGroups, SequenceLayout]:
        """What attention is called with here instead of these: one rank, which holds all tokens in the ranks' order.

        Args:
            config, groups, layout: with which attention would exchange itself.

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
# Attention modules that ran inside an exchange: their checkpoint runs them again in the backward pass, outside of it.
_inside: WeakKeyDictionary[torch.nn.Module, Exchanged] = WeakKeyDictionary()


@contextmanager
def exchanging(around: Exchanged) -> Iterator[None]:
    """Within it, attention sees what ``around`` exchanged."""
    token = _now.set(around)
    try:
        yield
    finally:
        _now.reset(token)


def exchange_around(attention: torch.nn.Module) -> Exchanged | None:
    """The exchange around this call of ``attention``, None where it sees the tokens of its own rank.

    An attention that exchanges asks this first, on every call; one that has run inside an exchange is inside it again
    when a checkpoint runs it once more in the backward pass.
    """
    around = _now.get()
    if around is not None:
        _inside[attention] = around
        return around
    recomputes = torch._C._current_graph_task_id() != -1
    return _inside.get(attention) if recomputes else None
