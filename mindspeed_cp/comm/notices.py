"""Short messages between processes of one host, through pipes: what goes ahead of a message in shared memory.

Each rank has a pipe for each peer, which only that peer writes to. A notice is NUMBERS whole numbers, less than what a
pipe takes in one piece, so that none is ever cut in two; telling it is one call of the system and waits for nobody,
hearing it is one or two. A peer that has ended, or has closed its side, is noticed at once: its pipe has an end.

Pipes are opened as the memory itself is, through the files of a peer's process.
"""

import os
import select
import struct
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch
import torch.distributed as dist

NUMBERS = 5  # of a notice
_RECORD = struct.Struct(f"=Q{NUMBERS}q")  # the stream to which it belongs, and its numbers
_AT_ONCE = 64 * _RECORD.size  # bytes that are read at once

Numbers = tuple[int, ...]


def stream_of(group: dist.ProcessGroup, tag: int) -> int:
    """Tells the notices of one group and tag from those of others, the same on all of its members."""
    return int.from_bytes(blake2b(f"{group.group_name} {tag}".encode(), digest_size=8).digest(), "little")


@dataclass(eq=False)
class Notice:
    """One that a peer will tell; ``wait`` is that of torch's transfers.

    Args:
        place: (stream, how many of the stream come before it).
        numbers: what was told, once it was awaited.
    """

    notices: "Notices"
    peer: int
    place: tuple[int, int]
    numbers: Numbers = ()

    def wait(self) -> None:
        """Have its numbers.

        Raises:
            RuntimeError: the peer has ended before it told them, or did not within the time limit.
        """
        self.numbers = self.notices.hear(self.peer, self.place)


class Notices:
    """The pipes between this rank and its peers.

    Args:
        seconds: how long to wait for one notice.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: dict[int, int] = {}  # peer -> its own end of the pipe to this rank, until it has opened that
        self._from: dict[int, int] = {}
        self._waiting: select.epoll | None = None  # for any of those; made once, as later no file may be opened
        self._to: dict[int, int] = {}
        self._expected: Counter[tuple[int, int]] = Counter()  # (peer, stream) -> notices
        self._come: Counter[tuple[int, int]] = Counter()
        self._heard: defaultdict[int, dict[tuple[int, int], Numbers]] = defaultdict(dict)

    def listen(self, peer: int) -> int:
        """Make the pipe of a peer; returns the file, of this process, that it opens.

        Raises:
            OSError: no more files may be opened.
        """
        if self._waiting is None:
            self._waiting = select.epoll()
        self._from[peer], self._ends[peer] = os.pipe()
        os.set_blocking(self._from[peer], False)
        self._waiting.register(self._from[peer], select.EPOLLIN)
        return self._ends[peer]

    def open(self, peer: int, process: int, file: int) -> None:
        """Open the pipe that ``peer`` has made for this rank.

        Raises:
            OSError: it is not there, or no more files may be opened.
        """
        self._to[peer] = os.open(f"/proc/{process}/fd/{file}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def keep(self, peers: frozenset[int]) -> None:
        """All have opened what they could: let go of the others, and of the ends that are the peers' own."""
        for files in (self._from, self._to):
            for peer in files.keys() - peers:
                os.close(files.pop(peer))
        while self._ends:
            os.close(self._ends.popitem()[1])
        if not peers:
            self.close()

    def tell(self, peer: int, stream: int, numbers: Numbers) -> None:
        """Send a notice. Where a pipe is full, what others have told is taken in meanwhile.

        Raises:
            RuntimeError: the peer takes none within the time limit. OSError: it has ended.
        """
        record, until = _RECORD.pack(stream, *numbers), time.monotonic() + self._seconds
        while True:
            try:
                os.write(self._to[peer], record)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RuntimeError(f"it took no notice in {self._seconds:g} s") from None
                self._take_in_all(0.001)

    def expect(self, peer: int, stream: int) -> Notice:
        """The next notice of the stream from ``peer``; they are expected in the order in which they are told."""
        number = self._expected[peer, stream]
        self._expected[peer, stream] += 1
        return Notice(self, peer, (stream, number))

    def hear(self, peer: int, place: tuple[int, int]) -> Numbers:
        heard = self._heard[peer]
        if place not in heard:
            self._take_in(peer)
        until = time.monotonic() + self._seconds
        while place not in heard:
            if peer not in self._from:
                raise RuntimeError("it has ended, or has closed its groups")
            left = until - time.monotonic()
            if left < 0:
                raise RuntimeError(f"it told nothing in {self._seconds:g} s")
            self._take_in_all(left)
        return heard.pop(place)

    def _take_in_all(self, seconds: float) -> None:
        """Read what any peer has told, once somebody has or the time is over."""
        assert self._waiting is not None
        ready = {file for file, _ in self._waiting.poll(seconds)}
        for peer in [peer for peer, file in self._from.items() if file in ready]:
            self._take_in(peer)

    def _take_in(self, peer: int) -> None:
        """Read what a peer has told so far; the pipe of one that has ended is closed once that is read."""
        if peer not in self._from:
            return
        try:
            data = os.read(self._from[peer], _AT_ONCE)
        except BlockingIOError:
            return
        for stream, *numbers in _RECORD.iter_unpack(data):
            self._heard[peer][stream, self._come[peer, stream]] = tuple(numbers)
            self._come[peer, stream] += 1
        if not data:
            os.close(self._from.pop(peer))

    def close(self) -> None:
        for files in (self._from, self._to, self._ends):
            while files:
                os.close(files.popitem()[1])
        if self._waiting is not None:
            self._waiting.close()


def seconds_of(group: dist.ProcessGroup) -> float:
    """The time limit of a group of gloo."""
    limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return limit.total_seconds()
