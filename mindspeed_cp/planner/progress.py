"""A progress line on a terminal while the planner works."""

import sys
import time
from types import TracebackType

EVERY = 0.5  # seconds between updates


class Progress:
    """Prints on a terminal how many ways to train are decided, at most once every EVERY seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._shown = False

    def __enter__(self) -> "Progress":
        return self

    def note(self, decided: int, of: int) -> None:
        """Report that ``decided`` of ``of`` ways are decided; ways that cannot be among the fastest are never tried."""
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._last >= EVERY:
            self._last, self._shown = now, True
            print(f"\rplanning: checked {decided} of {of} ways to train", end="", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
