"""Events of one rank in one pass, in order: blocks and products computed, transfers posted and awaited."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mindspeed_cp.comm.meter import Traffic, count_bytes
from mindspeed_cp.planner.cluster import HEAD_DIM, Cluster

LONG = 1 << 30  # tokens of a block that is long enough for any kernel


@dataclass(frozen=True)
class Compute:
    """A block: FLOPs, shorter side of its pieces (their mean by cost for a kernel), head dimension."""

    flops: int
    tokens: float = LONG
    head_dim: int = HEAD_DIM

    def seconds(self, cluster: Cluster) -> float:
        return cluster.attention_seconds(self.flops, self.tokens, self.head_dim)


@dataclass(frozen=True)
class Product:
    """A matrix product: FLOPs, rows, and the smaller of the other sizes."""

    flops: int
    rows: int
    columns: int

    def seconds(self, cluster: Cluster) -> float:
        return cluster.product_seconds(self.flops, self.rows, self.columns)


@dataclass(frozen=True)
class Post:
    """A transfer starts: bytes to and from every global rank.

    Args:
        of_heads: it is part of Ulysses' exchange, not of a ring's transfer of keys and values.
    """

    number: int
    sent: dict[int, int]
    received: dict[int, int]
    of_heads: bool = False


@dataclass(frozen=True)
class Wait:
    number: int


Event = Compute | Product | Post | Wait


@dataclass
class Pass:
    """What one rank did in the forward or the backward pass, in order, and the bytes by purpose."""

    events: list[Event] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def sent(self) -> Counter[int]:
        """Bytes to every global rank."""
        total: Counter[int] = Counter()
        for event in self.events:
            if isinstance(event, Post):
                total.update(event.sent)
        return total


@dataclass(frozen=True)
class Notes:
    """Recorder to which links and kernel report events."""

    events: list[Event] = field(default_factory=list)

    def post(self, sent: dict[int, int], received: dict[int, int], of_heads: bool = False) -> "Transfer":
        number = len(self.events)
        leaving, arriving = ({r: n for r, n in ends.items() if n} for ends in (sent, received))
        self.events.append(Post(number, leaving, arriving, of_heads))
        return Transfer(number, self.events)

    def passes(self, computed: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> tuple[Pass, Pass]:
        """Return the events of the (forward, backward) pass of ``computed(*leaves)``."""
        with count_bytes() as forward:
            out = computed(*leaves)
        passed = len(self.events)
        with count_bytes() as backward:
            out.backward(out)
        return Pass(self.events[:passed], forward), Pass(self.events[passed:], backward)


@dataclass
class Transfer:
    """A posted transfer, whatever the number of its works; only its first ``wait`` is recorded."""

    number: int
    events: list[Event]
    is_over: bool = False

    def wait(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.events.append(Wait(self.number))
