"""Document ends that a framework passes separately from the batch (MindSpeed's ``set_actual_seq_len``).

MindSpeed keeps them until others are set, and its attention reads them when it runs. So they apply to the next batch
that is split, and to every later forward pass whose own batch contains no documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_cp.megatron.records import Documents


@dataclass
class Handed:
    """The values that were set last.

    Args:
        ends: document ends over the concatenated rows of a micro-batch, with or without a leading 0.
        waiting: whether no batch has used them yet.
        times: how often they were set.
        of_a_split: whether a batch used them when it was split.
        position_ids: stored for the getter, not used here.
    """

    ends: torch.Tensor | Sequence[int] | None = None
    waiting: bool = False
    times: int = 0
    of_a_split: bool = False
    position_ids: Any = None

    def set_ends(self, ends: torch.Tensor | Sequence[int] | None) -> None:
        self.ends, self.waiting, self.of_a_split = ends, ends is not None, False
        self.times += 1

    def take(self, rows: int, seq_len: int, divided_by: int = 1) -> Documents | None:
        """Boundaries of every row of a batch (one row if all rows have the same), or None.

        Args:
            rows, seq_len: those of the whole batch.
            divided_by: the ring size, by which MindSpeed divides ends in its causal ring; the last end shows whether it
                did.

        Raises:
            ValueError: the ends do not ascend, or the last one is not the end of the batch.
        """
        if self.ends is None:
            return None
        self.waiting = False
        given = self.ends.flatten().tolist() if isinstance(self.ends, torch.Tensor) else list(self.ends)
        ends, total = [int(end) for end in given if end], rows * seq_len
        if ends and divided_by > 1 and ends[-1] * divided_by == total:
            ends = [end * divided_by for end in ends]
        if ends != sorted(ends) or not ends or ends[-1] > total or ends[0] < 0:
            raise ValueError(self._refusal(ends, rows, seq_len, divided_by))
        if divided_by > 1 and ends[-1] != total:
            raise ValueError(self._refusal(ends, rows, seq_len, divided_by))
        starts = [row * seq_len for row in range(rows)]
        found = tuple((0, *(end - start for end in ends if start < end < start + seq_len), seq_len) for start in starts)
        return found[:1] if len(set(found)) == 1 else found

    def _refusal(self, ends: list[int], rows: int, seq_len: int, divided_by: int) -> str:
        total = rows * seq_len
        way_out = f"the last one {total}" + (f", or all divided by {divided_by}" if divided_by > 1 else "")
        return (
            f"set_actual_seq_len got ends up to {ends[-1] if ends else 'nothing'}, and the batch has {rows} rows "
            f"of {seq_len} tokens; give ascending ends over all its rows, {way_out}."
        )
