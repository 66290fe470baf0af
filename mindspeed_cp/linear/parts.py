"""Contiguous parts of a sequence, in rank order: what a rank needs from the rank before it.

s: tokens of this rank, b: batch, c: channels.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from mindspeed_cp.comm.link import Link
from mindspeed_cp.linear.recurrence import Convolution, Documents
from mindspeed_cp.linear.rows import exchange_rows, rows_before
from mindspeed_cp.linear.state import Chain
from mindspeed_cp.sequence.layout import SequenceLayout


@dataclass(frozen=True, eq=False)
class OwnPart:
    """This rank's part.

    Args:
        link: over the ranks of the sequence.
        parts: one run of tokens for each rank, in rank order.
        whole: boundaries of documents in the whole sequence.
    """

    link: Link
    parts: SequenceLayout
    whole: Documents

    @cached_property
    def documents(self) -> Documents:
        """Boundaries within the part."""
        return local_documents(self.whole, *self.parts.runs(self.link.rank)[0])

    @property
    def chain(self) -> Chain:
        """The chain in which a part that begins inside a document continues with the state of the part before it."""
        return Chain(self.link, tuple(runs[0][0] not in self.whole for runs in self.parts.all_runs))

    def convolved(
        self, convolve: Convolution, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """(s, b, c) -> (b, s, c), a convolution that also reads the inputs before the part, from other ranks.

        Args:
            weight: (c, width). bias: (c,) or None.
        """
        plan = rows_before(self.parts, weight.size(1) - 1, self.whole)
        before = exchange_rows(inputs, plan, self.link, "inputs")
        seen = before.size(0)  # also joined if empty, because the rows that this rank sent have gradients
        rows = torch.cat([before, inputs]).transpose(0, 1).contiguous()
        ends = (0, *(end + seen for end in self.documents[1:]))
        return convolve(rows, weight, bias, ends)[:, seen:]


def local_documents(documents: Documents, start: int, stop: int) -> Documents:
    """Boundaries of non-empty documents within the tokens start to stop, relative to ``start``."""
    inside = sorted({end - start for end in documents if start < end < stop})
    return (0, *inside, stop - start)
