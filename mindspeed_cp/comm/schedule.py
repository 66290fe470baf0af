"""Which rank's keys and values are where at each step of the double ring; the plain ring has one window.

Ring rank = W * window + i. Forward step (j, t) of rank (W, i) computes with the shard of rank
((W - j) mod windows, (i - t) mod window). Source: LoongTrain (arXiv 2406.18485), section on Double-Ring-Attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """What a rank computes at one step.

    Args:
        window, place: index of the window, and of the step in it; place 0 of window 0 is the rank's own shard.
        source: the ring rank whose shard is used; None for slices of all other shards (the mesh exchange).
        piece: index of the piece of the shard, if shards are split into pieces.
    """

    window: int
    place: int
    source: int | None
    piece: int = 0


@dataclass(frozen=True)
class RingPlace:
    """One rank's place in a double ring of ``windows`` windows of ``window`` ranks."""

    rank: int
    window: int
    windows: int

    def peer(self, outer: int, inner: int) -> int:
        """The rank ``outer`` windows and ``inner`` places after this one, cyclically in both."""
        place_w, place_i = divmod(self.rank, self.window)
        return (place_w + outer) % self.windows * self.window + (place_i + inner) % self.window

    def steps(self) -> Iterator[Step]:
        """All steps in order; the first source is the rank itself."""
        for outer in range(self.windows):
            for inner in range(self.window):
                yield Step(outer, inner, self.peer(-outer, -inner))


def forward_schedule(ring_rank: int, window: int, windows: int) -> list[int | None]:
    """The ring ranks whose shards ``ring_rank`` computes with, in order."""
    return [step.source for step in RingPlace(ring_rank, window, windows).steps()]
