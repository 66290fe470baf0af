"""What a rank waits for others and computes for itself: measured where somebody watches, and nowhere else."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Those that watch now; autograd may run the backward pass in another thread, so this is not a context variable.
_active: list["Watch"] = []


class Watch:
    """Waits and work of this rank inside ``watching``.

    Attributes:
        area: (query, key) pairs that forward passes of attention computed, times batch rows and query heads.
    """

    def __init__(self) -> None:
        self.area = 0
        self._seconds = 0.0
        self._on_stream: deque[tuple[Any, Any]] = deque()  # events around waits that may not have ended yet

    @property
    def seconds(self) -> float:
        """How long transfers kept this rank waiting, the time that no computation hid; it awaits those under way."""
        for _, after in self._on_stream:
            after.synchronize()
        self._collect()
        return self._seconds

    def add_seconds(self, seconds: float) -> None:
        self._seconds += seconds

    def add_events(self, before: Any, after: Any) -> None:
        """A wait on the device's stream, between two events."""
        self._on_stream.append((before, after))
        self._collect()

    def _collect(self) -> None:
        """Sum up what has ended, so that no more events are held than waits are under way."""
        while self._on_stream and self._on_stream[0][1].query():
            before, after = self._on_stream.popleft()
            self._seconds += before.elapsed_time(after) / 1000


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Let ``watch`` measure inside the block."""
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.remove(watch)


def wait_for(work: Any, device: torch.device) -> None:
    """``work.wait()`` for a transfer of tensors on ``device``.

    A CPU's wait takes the host's time. An accelerator's makes its stream wait while the host goes on: there the time
    is that between an event before and one after it on the stream.
    """
    if not _active:
        work.wait()
    elif device.type == "cpu":
        start = time.perf_counter()
        work.wait()
        seconds = time.perf_counter() - start
        for watch in _active:
            watch.add_seconds(seconds)
    else:
        before, after = (getattr(torch, device.type).Event(enable_timing=True) for _ in range(2))
        before.record()
        work.wait()
        after.record()
        for watch in _active:
            watch.add_events(before, after)


def note_area(area: Callable[[], int]) -> None:
    """Note the area of one forward pass of attention; ``area`` is called where somebody watches."""
    if _active:
        noted = area()
        for watch in _active:
            watch.area += noted
