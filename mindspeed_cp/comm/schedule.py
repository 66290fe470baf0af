"""Whose keys and values are where at which step: the double ring, of which the plain ring is one window.

Ring rank = W * window + i. Forward step (j, t) of rank (W, i) computes with the shard of rank
((W - j) mod windows, (i - t) mod window). Source: LoongTrain (arXiv 2406.18485), section on Double-Ring-Attention.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RingPlace:
    """One rank's place in a double ring of ``windows`` windows of ``window`` ranks."""

    rank: int
    window: int
    windows: int

    def peer(self, outer, inner):
        """The rank that lies ``outer`` windows and ``inner`` places further on, wrapping round in each."""
        place_w, place_i = divmod(self.rank, self.window)
        return (place_w + outer) % self.windows * self.window + (place_i + inner) % self.window

    def steps(self):
        """(j, t, source) of every step in order; the first source is the rank itself."""
        for outer in range(self.windows):
            for inner in range(self.window):
                yield outer, inner, self.peer(-outer, -inner)


def forward_schedule(ring_rank, window, windows):
    """The ring ranks whose shards ``ring_rank`` computes with, in order."""
    return [source for _, _, source in RingPlace(ring_rank, window, windows).steps()]
