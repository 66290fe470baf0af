"""The cost of context parallelism during training (--cp-log): bytes, waits, and their imbalance.

    log = ContextParallelLog(cp_ranks, device)
    for iteration in ...:
        with log.step():
            train_step(...)
        if iteration % 100 == 0:
            figures = log.interval()  # collective: one all-gather of ten numbers and one more per step

Nothing is measured outside ``step``, and a run without a log has no overhead.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_cp.comm.meter import Watch, measuring

# The purposes whose bytes ranks exchange; "other" is everything else, such as lengths.
PURPOSES = ("q", "kv", "out", "dout", "dq", "dkv", "other")


@dataclass(frozen=True)
class Imbalance:
    """The imbalance of a quantity in the context-parallel group where it is largest.

    Args:
        ratio: sum over steps of the largest value, divided by the sum of the mean; so a rank that is slow in one step
            and fast in the next does not compensate. 1 if all are equal.
        least: global rank with the smallest sum.
    """

    ratio: float
    least: int

    @classmethod
    def of(cls, values: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> "Imbalance":
        """The imbalance of ``values``: per global rank, one value per step, or only their sum."""

        def ratio(group: Sequence[int]) -> float:
            largest = sum(max(of_step) for of_step in zip(*(values[rank] for rank in group), strict=True))
            total = sum(sum(values[rank]) for rank in group)
            return largest * len(group) / total if total else 1.0

        worst = max(groups, key=ratio)
        return cls(ratio(worst), min(worst, key=lambda rank: sum(values[rank])))


@dataclass(frozen=True)
class IntervalFigures:
    """The steps between two lines of the log, the same on every rank.

    Args:
        num_steps: steps of the interval.
        bytes: purpose -> bytes that rank 0 sent; purposes as in ``Traffic``.
        step_seconds, wait_seconds: duration of the steps on rank 0, and for how long transfers kept it waiting.
        waits: imbalance of waits; the others wait for the rank that waits least.
        areas: imbalance of the area of attention in forward passes, step by step.
    """

    num_steps: int
    bytes: dict[str, int]
    step_seconds: float
    wait_seconds: float
    waits: Imbalance
    areas: Imbalance

    @property
    def wait_share(self) -> float:
        """Fraction of rank 0's step time spent waiting."""
        return self.wait_seconds / self.step_seconds if self.step_seconds else 0.0

    def line(self) -> str:
        sent = ", ".join(f"{purpose} {size}" for purpose, size in self.bytes.items())
        return (
            f"context parallelism of {self.num_steps} steps: rank 0 sent {f'{sent} bytes' if sent else 'nothing'} | "
            f"waited {1000 * self.wait_seconds / max(self.num_steps, 1):.1f} ms a step, {self.wait_share:.1%} of it | "
            f"largest over mean wait {self.waits.ratio:.2f}, rank {self.waits.least} waits least | "
            f"largest over mean attention area {self.areas.ratio:.2f}"
        )

    def scalars(self) -> dict[str, float]:
        """Name -> value for TensorBoard; bytes and seconds are per step."""
        steps = max(self.num_steps, 1)
        return {
            **{f"context-parallel/{purpose} bytes": size / steps for purpose, size in self.bytes.items()},
            "context-parallel/wait seconds": self.wait_seconds / steps,
            "context-parallel/wait share": self.wait_share,
            "context-parallel/wait imbalance": self.waits.ratio,
            "context-parallel/area imbalance": self.areas.ratio,
        }


class ContextParallelLog:
    """Measures this rank's steps and compares the ranks at the end of an interval.

    Args:
        cp_ranks: global ranks of every context-parallel group of the world.
        device: device of tensors for collectives of the default process group.
    """

    def __init__(self, cp_ranks: Sequence[Sequence[int]], device: torch.device | str | int) -> None:
        self._cp_ranks, self._device = cp_ranks, device
        self._begin()

    def _begin(self) -> None:
        self._seconds, self._watch = 0.0, Watch()
        self._areas = list[int]()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager that measures one training step."""
        start, area = time.perf_counter(), self._watch.area
        with measuring(self._watch):
            yield
        self._areas.append(self._watch.area - area)
        self._seconds += time.perf_counter() - start

    def interval(self) -> IntervalFigures:
        """The figures of the steps since the last call; every rank of the world calls this."""
        known = [self._watch[purpose] for purpose in PURPOSES[:-1]]
        mine = [
            round(1e6 * self._seconds),
            round(1e6 * self._watch.seconds),
            *known,
            self._watch.total_bytes - sum(known),
            *self._areas,
        ]
        num_steps, first = len(self._areas), 2 + len(PURPOSES)
        self._begin()
        row = torch.tensor(mine, dtype=torch.int64, device=self._device)  # integers: all back ends can gather them
        gathered = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, row)
        rows: list[list[int]] = [other.tolist() for other in gathered]
        step_time, wait_time, *sizes = rows[0][:first]
        return IntervalFigures(
            num_steps,
            {purpose: size for purpose, size in zip(PURPOSES, sizes, strict=True) if size},
            step_time / 1e6,
            wait_time / 1e6,
            Imbalance.of([row[1:2] for row in rows], self._cp_ranks),
            Imbalance.of([row[first:] for row in rows], self._cp_ranks),
        )
