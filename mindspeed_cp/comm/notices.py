"""Short messages between processes of one host, sent through pipes: they announce messages in shared memory.

Each rank has one pipe for each peer, which only that peer writes. A notice is NUMBERS integers, fewer bytes than a pipe
accepts in one piece, so it is never split. Sending is one system call and does not wait for the receiver; receiving is
one or two. If a peer ends or closes its side, the receiver sees the end of its pipe at once.

Pipes are opened like the memory itself, through the files of a peer's process.
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
_LONGEST_WAIT = 3600.0  # seconds of one poll; epoll takes no more than 2**31 ms, and time limits may be longer

Numbers = tuple[int, ...]


def stream_of(group: dist.ProcessGroup, tag: int) -> int:
    """An identifier of the notices of one group and tag, the same on all members of the group."""
    return int.from_bytes(blake2b(f"{group.group_name} {tag}".encode(), digest_size=8).digest(), "little")


@dataclass(eq=False)
class Notice:
    """A notice that a peer will send; ``wait`` works like that of torch's transfers.

    Args:
        place: (stream, number of earlier notices of the stream).
        numbers: its content, after ``wait``.
    """

    notices: "Notices"
    peer: int
    place: tuple[int, int]
    numbers: Numbers = ()

    def wait(self) -> None:
        """Receive it.

        Raises:
            RuntimeError: the peer ended before it sent the notice, or did not send it within the time limit.
        """
        self.numbers = self.notices.hear(self.peer, self.place)


class Notices:
    """The pipes between this rank and its peers.

    Args:
        seconds: time limit for one notice.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends: dict[int, int] = {}  # writing ends of the pipes to this rank, until the peers have opened them
        self._from: dict[int, int] = {}
        self._to: dict[int, int] = {}
        self._waiting: select.epoll | None = None  # made once, because later no file may be available
        self._expected: Counter[tuple[int, int]] = Counter()  # (peer, stream) -> notices
        self._come: Counter[tuple[int, int]] = Counter()
        self._heard: defaultdict[int, dict[tuple[int, int], Numbers]] = defaultdict(dict)

    def listen(self, peer: int) -> int:
        """Make the pipe that a peer writes; returns the file of this process that the peer opens.

        Raises:
            OSError: too many open files.
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
            OSError: the pipe does not exist, or too many open files.
        """
        self._to[peer] = os.open(f"/proc/{process}/fd/{file}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def keep(self, peers: frozenset[int]) -> None:
        """Close the pipes of all others, and the ends that the peers have opened by now."""
        for peer in self._from.keys() - peers:
            self._hear_no_more(peer)
        for peer in self._to.keys() - peers:
            os.close(self._to.pop(peer))
        while self._ends:
            os.close(self._ends.popitem()[1])
        if not peers:
            self.close()

    def tell(self, peer: int, stream: int, numbers: Numbers) -> None:
        """Send a notice. While the pipe is full, notices of other peers are received.

        Raises:
            RuntimeError: the pipe stays full for the time limit. OSError: the peer has ended.
        """
        record, until = _RECORD.pack(stream, *numbers), time.monotonic() + self.seconds
        while True:
            try:
                os.write(self._to[peer], record)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RuntimeError(f"it took no notice in {self.seconds:g} s") from None
                self._take_in_all(0.001)

    def expect(self, peer: int, stream: int) -> Notice:
        """The next notice of the stream from ``peer``; those of one stream arrive in the order of sending."""
        number = self._expected[peer, stream]
        self._expected[peer, stream] += 1
        return Notice(self, peer, (stream, number))

    def hear(self, peer: int, place: tuple[int, int]) -> Numbers:
        heard = self._heard[peer]
        if place not in heard:
            self._take_in(peer)
        until = time.monotonic() + self.seconds
        while place not in heard:
            if peer not in self._from:
                raise RuntimeError("it has ended, or has closed its groups")
            left = until - time.monotonic()
            if left < 0:
                raise RuntimeError(f"it told nothing in {self.seconds:g} s")
            self._take_in_all(left)
        return heard.pop(place)

    def idle(self, peer: int, until: float) -> None:
        """Receive notices for a moment while this rank waits for something else from ``peer``.

        Raises:
            RuntimeError: the peer has ended, or the time ``until`` (of time.monotonic) is over.
        """
        if peer not in self._from:
            raise RuntimeError(f"rank {peer} has ended, or has closed its groups")
        if time.monotonic() > until:
            raise RuntimeError(f"rank {peer} did not read a message in {self.seconds:g} s")
        self._take_in_all(0.001)

    def _take_in_all(self, seconds: float) -> None:
        """Receive from all peers that have sent something; wait up to ``seconds`` until one has."""
        assert self._waiting is not None
        ready = {file for file, _ in self._waiting.poll(min(seconds, _LONGEST_WAIT))}
        for peer in [peer for peer, file in self._from.items() if file in ready]:
            self._take_in(peer)

    def _take_in(self, peer: int) -> None:
        """Receive what a peer has sent so far. If the peer has ended and everything was read, close its pipe."""
        if peer not in self._from:
            return
        try:
            data = os.read(self._from[peer], _AT_ONCE)
        except BlockingIOError:
            return
        for stream, *numbers in _RECORD.iter_unpack(data):
            place = stream, self._come[peer, stream]
            self._come[peer, stream] += 1
            self._heard[peer][place] = tuple(numbers)
        if not data:
            self._hear_no_more(peer)

    def _hear_no_more(self, peer: int) -> None:
        """Close the pipe of a peer; a process forked from this one may hold it open, so it is not waited for either."""
        file = self._from.pop(peer)
        if self._waiting is not None:
            self._waiting.unregister(file)
        os.close(file)

    def close(self) -> None:
        for files in (self._from, self._to, self._ends):
            while files:
                os.close(files.popitem()[1])
        if self._waiting is not None:
            self._waiting.close()


def seconds_of(group: dist.ProcessGroup) -> float:
    """The time limit of a gloo group."""
    limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return limit.total_seconds()
