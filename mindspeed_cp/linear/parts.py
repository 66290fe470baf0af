"""One part of a sequence on each rank, in rank order: what a rank needs of the rank before it.

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
        """A part that begins inside a document goes on with the state of the part before it."""
        return Chain(self.link, tuple(runs[0][0] not in self.whole for runs in self.parts.all_runs))

    def convolved(
        self, convolve: Convolution, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """(s, b, c) -> (b, s, c), with the inputs in front of the part that the convolution reads.

        Args:
            weight: (c, width). bias: (c,) or None.
        """
        plan = rows_before(self.parts, weight.size(1) - 1, self.whole)
        before = exchange_rows(inputs, plan, self.link, "inputs")
        seen = before.size(0)  # joined where there are none too, for what this rank gave others has gradients
        rows = torch.cat([before, inputs]).transpose(0, 1).contiguous()
        ends = (0, *(end + seen for end in self.documents[1:]))
        return convolve(rows, weight, bias, ends)[:, seen:]


def local_documents(documents: Documents, start: int, stop: int) -> Documents:
    """Where documents end within the tokens start to stop, counted from there, without empty ones."""
    inside = sorted({end - start for end in documents if start < end < stop})
    return (0, *inside, stop - start)
