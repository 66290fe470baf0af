"""Counting what this rank sends: bytes are exact, so tests can assert them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# The counters that are open now. Autograd may run the backward pass in another thread, so this is not a context
# variable.
_active: list["Traffic"] = []


class Traffic:
    """What one rank sent, by purpose: "q", "kv", "out" forward, "dout", "dq", "dkv" backward.

    Attributes:
        bytes: Counter, purpose -> bytes.
        messages: Counter, purpose -> messages. A message that carries several purposes counts for the first.
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
        return f"Traffic({rows or 'nothing'})"


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count the bytes and messages that this rank sends inside the block; yields a ``Traffic``. Blocks may nest."""
    traffic = Traffic()
    _active.append(traffic)
    try:
        yield traffic
    finally:
        _active.remove(traffic)


def record(sizes: Mapping[str, int], messages: int = 1) -> None:
    """Note one transfer; ``sizes`` maps purpose -> bytes, the messages count for its first purpose."""
    for traffic in _active:
        for index, (purpose, size) in enumerate(sizes.items()):
            traffic.bytes[purpose] += size
            traffic.messages[purpose] += 0 if index else messages
