"""What an all-to-all sends: the shapes of its parts, and the exchange while it is under way.

Shapes: (rows, batch, heads, head_dim); rows are tokens of one rank or of the whole sequence.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """One tensor of a message.

    Args:
        purpose: what its bytes count as.
        num_heads, dim: heads of the whole tensor, and their size.
        shares: per rank, the heads that it gets: a slice, or a list of indices. A head may go to several ranks.
    """

    purpose: str
    num_heads: int
    dim: int
    shares: tuple

    def count(self, rank):
        share = self.shares[rank]
        return share.stop - share.start if isinstance(share, slice) else len(share)

    def width(self, rank):
        return self.count(rank) * self.dim

    @property
    def replicated(self):
        return sum(map(self.count, range(len(self.shares)))) > self.num_heads


@dataclass(frozen=True)
class Slab:
    """Shape of what goes from one rank to another: heads of several tensors side by side, for every token.

    Args:
        heads: ((number of heads, head_dim), ...) of the tensors.
    """

    rows: int
    batch: int
    heads: tuple

    @property
    def size(self):
        return self.rows * self.batch * sum(count * dim for count, dim in self.heads)

    def apart(self, flat):
        """Views (rows, batch, heads, head_dim) of each tensor in a flat one."""
        widths = [count * dim for count, dim in self.heads]
        row = flat.view(self.rows, self.batch, sum(widths))
        return [piece.unflatten(-1, shape) for piece, shape in zip(row.split(widths, dim=-1), self.heads)]


@dataclass(frozen=True, eq=False)
class Message:
    """What one rank has for all ranks.

    Args:
        like: a tensor of its dtype and device.
        pieces: rank -> list of (rows, batch, heads, head_dim): that rank's part of each tensor.
        packed: () -> flat tensor with all ranks' parts in rank order, as one collective wants it.
        leaving, arriving: per rank, the Slab that goes there and the one that comes from there.
    """

    like: torch.Tensor
    pieces: object
    packed: object
    leaving: list
    arriving: list


class Pending:
    """An exchange under way. ``wait`` returns its tensors; call it once, and in the same order on all ranks.

    The tensors that were given to it must not change before.
    """

    def __init__(self, finish):
        self._finish = finish

    def wait(self):
        return self._finish()


def heads_of(parts, rank):
    """((number of heads, head_dim), ...) that ``rank`` gets of each part."""
    return tuple((part.count(rank), part.dim) for part in parts)


def fill(targets, sources):
    """Copy each source into its target."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
