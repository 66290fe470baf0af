"""Document ends that a framework hands over before the batch is split (MindSpeed's ``set_actual_seq_len``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_cp.megatron.records import Documents


@dataclass
class Handed:
    """What was set last.

    Args:
        ends: document ends over the rows of a micro-batch one after another, without the leading 0.
        waiting: no batch has taken them yet.
        position_ids: kept for those who ask, read by nobody here.
    """

    ends: torch.Tensor | Sequence[int] | None = None
    waiting: bool = False
    position_ids: Any = None

    def set_ends(self, ends: torch.Tensor | Sequence[int] | None) -> None:
        self.ends, self.waiting = ends, ends is not None

    def take(self, rows: int, seq_len: int) -> Documents | None:
        """Boundaries of every row of the batch that is split now (one row where all share them); None without.

        Raises:
            ValueError: the ends do not ascend to the end of the batch.
        """
        if not self.waiting or self.ends is None:
            return None
        self.waiting = False
        given = self.ends.flatten().tolist() if isinstance(self.ends, torch.Tensor) else list(self.ends)
        ends = [int(end) for end in given if end]
        total = rows * seq_len
        if ends != sorted(ends) or not ends or ends[-1] > total or ends[0] < 0:
            raise ValueError(
                f"set_actual_seq_len got ends up to {ends[-1] if ends else 'nothing'}, and the batch has {rows} rows "
                f"of {seq_len} tokens; give ascending ends over all its rows, the last one {total}."
            )
        starts = [row * seq_len for row in range(rows)]
        return tuple((0, *(end - start for end in ends if start < end < start + seq_len), seq_len) for start in starts)
