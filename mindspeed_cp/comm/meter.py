"""Measures what this rank sends, waits for and computes, only while somebody measures.

Bytes are exact, so that tests can assert them. Waits need clocks or events and are measured only for a ``Watch``.
Ranges are named for a profiler while one records.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.autograd import profiler

_NO_RANGE = nullcontext()
# Active meters; not a context variable, because autograd may run the backward pass in another thread.
_open: list["Traffic"] = []

M = TypeVar("M", bound="Traffic")


class Traffic:
    """What one rank sent, by purpose: "q", "kv", "out" forward, "dout", "dq", "dkv" backward.

    Attributes:
        bytes: Counter, purpose -> bytes.
        messages: Counter, purpose -> messages. A message with several purposes counts for the first.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def total_messages(self) -> int:
        return sum(self.messages.values())

    def __getitem__(self, purpose: str) -> int:
        return self.bytes[purpose]

    def __repr__(self) -> str:
        rows = ", ".join(
            f"{purpose}: {self.bytes[purpose]} bytes in {self.messages[purpose]}" for purpose in sorted(self.bytes)
        )
        return f"{type(self).__name__}({rows or 'nothing'})"


class Watch(Traffic):
    """Traffic, waits and work of this rank.

    Attributes:
        area: (query, key) pairs computed in forward passes of attention, times batch rows and query heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.area = 0
        self._seconds = 0.0
        self._on_stream: deque[tuple[Any, Any]] = deque()  # events around waits that may still be running

    @property
    def seconds(self) -> float:
        """Seconds for which transfers kept this rank waiting, not hidden by computation; awaits running waits."""
        for _, after in self._on_stream:
            after.synchronize()
        self._collect()
        return self._seconds

    def add_seconds(self, seconds: float) -> None:
        self._seconds += seconds

    def add_events(self, before: Any, after: Any) -> None:
        """Add a wait on the device's stream, between two events."""
        self._on_stream.append((before, after))
        self._collect()

    def _collect(self) -> None:
        """Sum up waits that have ended, so that only events of running waits are held."""
        while self._on_stream and self._on_stream[0][1].query():
            before, after = self._on_stream.popleft()
            self._seconds += before.elapsed_time(after) / 1000


@contextmanager
def measuring(meter: M) -> Iterator[M]:
    """Context manager in which ``meter`` measures; may be nested."""
    _open.append(meter)
    try:
        yield meter
    finally:
        _open.remove(meter)


def count_bytes() -> AbstractContextManager[Traffic]:
    """Context manager that counts the bytes and messages that this rank sends; yields a ``Traffic``. May be nested."""
    return measuring(Traffic())


def record(sizes: Mapping[str, int], messages: int = 1) -> None:
    """Record one transfer; ``sizes`` maps purpose -> bytes, and the messages count for its first purpose."""
    for meter in _open:
        for index, (purpose, size) in enumerate(sizes.items()):
            meter.bytes[purpose] += size
            meter.messages[purpose] += 0 if index else messages


def named(what: str) -> AbstractContextManager[Any]:
    """A named range for torch.profiler, and an NVTX range with torch.autograd.profiler.emit_nvtx.

    Without a profiler it does nothing and costs nothing.
    """
    return profiler.record_function(f"context parallelism: {what}") if profiler._is_profiler_enabled else _NO_RANGE


def _watches() -> list[Watch]:
    return [meter for meter in _open if isinstance(meter, Watch)]


def wait_for(work: Any, device: torch.device) -> None:
    """``work.wait()`` for a transfer of tensors on ``device``.

    On a CPU the wait is measured in host time. On an accelerator the stream waits while the host continues, so the wait
    is measured between an event before it and an event after it on the stream.
    """
    with named("wait"):
        watches = _watches()
        if not watches:
            work.wait()
        elif device.type == "cpu":
            start = time.perf_counter()
            work.wait()
            seconds = time.perf_counter() - start
            for watch in watches:
                watch.add_seconds(seconds)
        else:
            before, after = (getattr(torch, device.type).Event(enable_timing=True) for _ in range(2))
            before.record()
            work.wait()
            after.record()
            for watch in watches:
                watch.add_events(before, after)


def note_area(area: Callable[[], int]) -> None:
    """Record the area of one forward pass of attention; ``area`` is called only if there is a Watch."""
    if watches := _watches():
        noted = area()
        for watch in watches:
            watch.area += noted
