"""Send CPU tensors between ranks of one host through shared memory, with a notice per message (``comm.notices``).

gloo sends a message through the host's network stack, which copies it twice and wakes threads for every part. Here the
sender writes it into memory that its peers have mapped and sends them its address; the receiver reads it in place and
marks it as read. A closed pipe shows that a peer has died.

    a rank's memory = messages, each at the lowest free address: one mark for every member | data

Every rank has one memory area: an anonymous file of SPAN bytes, of which only used parts have pages. Peers map all of
it when the groups are made and keep it mapped. So nothing is opened later, and nothing can fail later: a message whose
notice was sent arrives, whatever its sender does next (os._exit included), and nothing remains when the last process
ends. If there is no free memory, the notice says that gloo sends the message.

Ranks on other hosts, or in containers that do not see each other, cannot be reached; gloo sends their messages. Linux
only. Tested on x86-64; the marks rely on the processor finishing a read before a store that is thousands of
instructions later, which also holds on Arm.
"""

import mmap
import os
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.notices import Notices, seconds_of
from mindspeed_cp.settings.notices import warn_rank0, warn_this_rank

SPAN = 1 << 36  # bytes of address space for what one rank sends; 64 GiB, and a thousand ranks fit into one process
SMALLEST_MESSAGE = 1 << 14  # bytes; a smaller message is as cheap as its notice
LINE = 64  # bytes of a cache line, to which messages are aligned
UNREAD = 3  # messages that a rank lends before the first of them has been read


@dataclass(frozen=True)
class Parcel:
    """A message in this rank's memory.

    Args:
        start, stop: byte range in the memory, marks included.
        marks: words that its readers set.
    """

    start: int
    stop: int
    marks: tuple[int, ...]


class _Memory:
    """One rank's memory as this process sees it: ``data``, uint8, and the same memory as ``words`` of 8 bytes."""

    def __init__(self, file: int):
        mapped = mmap.mmap(file, SPAN)
        mapped.madvise(mmap.MADV_DONTDUMP)  # keep memory shared by all peers out of core dumps
        self.words = memoryview(mapped).cast("q")
        with torch.inference_mode(False):  # memory mapped during inference could not be written during training
            self.data = torch.frombuffer(mapped, dtype=torch.uint8)


class HostMemory:
    """Shared memory between this rank and the members of a group that run on the same host; make it with ``connect``.

    Attributes:
        peers: global ranks that share memory with this rank.
        smallest: messages of fewer bytes go through gloo.
        num_bytes: shared memory that this rank holds.
        notices: pipes for the notices about messages.
    """

    def __init__(
        self, members: list[int], file: int, memories: dict[int, _Memory], smallest: int, notices: Notices
    ) -> None:
        self._slot = {rank: index for index, rank in enumerate(members)}
        self._marks = -(-8 * len(members) // LINE) * LINE  # bytes before the data
        self._file, self._memories, self._own = file, memories, memories[dist.get_rank()]
        self.peers, self.smallest = frozenset(memories) - {dist.get_rank()}, smallest
        self._unread: list[Parcel] = []  # ascending in memory
        self._lent: defaultdict[int, deque[tuple[list[int], Parcel]]] = defaultdict(deque)
        self.num_bytes, self.notices = 0, notices

    @classmethod
    def connect(cls, group: dist.ProcessGroup, smallest: int = SMALLEST_MESSAGE) -> "HostMemory | None":
        """Find out which members of ``group`` share memory with this rank; collective over the group.

        Returns:
            None if there are none, or the group's back end is not gloo.
        """
        if dist.get_backend(group) != "gloo":
            return None
        members, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        token = secrets.randbits(62)
        file = _create_file(_name(token))
        table = _gather([os.getpid(), file, token], group).tolist()
        memories, failed = _map_all(members, table)
        reached, failures = _agree(members, memories.keys(), failed, group)
        notices = Notices(seconds_of(group))
        opened, failed = _open_pipes(notices, members, reached, [process for process, *_ in table], group)
        alike, without_pipes = _agree(members, opened, failed, group)
        _announce(sorted({*failures, *without_pipes}))
        peers = alike - {members[rank]}
        notices.keep(peers)
        if peers:
            return cls(members, file, {member: memories[member] for member in sorted(alike)}, smallest, notices)
        if file >= 0:
            os.close(file)
        return None

    def carries(self, peer: int, device: torch.device, num_bytes: int) -> bool:
        """Whether such a message to or from ``peer`` uses shared memory if there is room; the same on both ends."""
        return peer in self.peers and device.type == "cpu" and num_bytes >= max(self.smallest, 1)

    def write(self, readers: list[int], message: Message) -> Parcel | None:
        """Copy a message for the global ranks ``readers`` to the lowest free address; None if there is no free memory.

        Messages that were read are free. So a rank that does not wait for a slow peer needs more memory in the
        meantime, and all other ranks reuse the same addresses, which already have pages.
        """
        size = self._marks + -(-message.num_bytes // LINE) * LINE
        self._unread = [parcel for parcel in self._unread if not all(map(self._own.words.__getitem__, parcel.marks))]
        index, start = 0, 0
        while index < len(self._unread) and self._unread[index].start - start < size:
            start = self._unread[index].stop
            index += 1
        if not self._backed(start + size):
            return None
        marks = tuple(start // 8 + self._slot[reader] for reader in readers)
        for mark in marks:
            self._own.words[mark] = 0
        data = start + self._marks
        message.write(self._own.data[data : data + message.num_bytes].view(message.dtype))
        parcel = Parcel(start, start + size, marks)
        self._unread.insert(index, parcel)
        return parcel

    def _backed(self, stop: int) -> bool:
        """Make sure that memory up to ``stop`` has pages; writing to memory without pages would kill the process."""
        if stop <= self.num_bytes:
            return True
        try:
            if stop > SPAN:
                raise OSError(f"{stop} bytes are more than the {SPAN} of its address space")
            os.posix_fallocate(self._file, self.num_bytes, stop - self.num_bytes)
        except OSError as error:
            warn_this_rank(f"shared memory between ranks has no room for a message ({error}); gloo carries it.")
            return False
        self.num_bytes = stop
        return True

    def lend(self, stream: int, readers: list[int], message: Message) -> Parcel | None:
        """Like ``write``, but wait while UNREAD messages of this stream are unread: a rank that needs nothing from its
        peers would otherwise run ahead of slow ones and hold one message for each pass.

        Raises:
            RuntimeError: a reader has ended, or did not read it within the time limit.
        """
        lent = self._lent[stream]
        if len(lent) == UNREAD:
            self._await_readers(*lent.popleft())
        parcel = self.write(readers, message)
        if parcel is not None:
            lent.append((readers, parcel))
        return parcel

    def _await_readers(self, readers: list[int], parcel: Parcel) -> None:
        until = time.monotonic() + self.notices.seconds
        while any(each is parcel for each in self._unread):
            late = [reader for reader, mark in zip(readers, parcel.marks) if not self._own.words[mark]]
            if not late:
                return
            self.notices.idle(late[0], until)

    def read(self, peer: int, start: int, num_bytes: int) -> torch.Tensor:
        """Return the message at ``start`` of the peer's memory, uint8, valid until ``release``."""
        return self._memories[peer].data[start + self._marks : start + self._marks + num_bytes]

    def release(self, peer: int, start: int) -> None:
        """Tell the peer that its message has been read."""
        if peer in self._memories:  # not after ``close``
            self._memories[peer].words[start // 8 + self._slot[dist.get_rank()]] = 1

    def close(self) -> None:
        """Unmap the memory; the mappings of peers stay valid until they close."""
        if self._memories:
            os.close(self._file)
            self.notices.close()
            del self._own
        self.peers, self._unread, self._memories = frozenset(), [], {}
        self._lent.clear()

    __del__ = close


def _name(token: int) -> str:
    return f"mindspeed_cp-{token}"


def _create_file(name: str) -> int:
    """Create an anonymous file of SPAN bytes; return -1 if the system lacks or forbids such files or their size."""
    try:
        file = os.memfd_create(name)
    except (AttributeError, OSError):
        return -1
    try:
        os.ftruncate(file, SPAN)
    except OSError:
        os.close(file)
        return -1
    return file


def _map_all(members: list[int], table: list[list[int]]) -> tuple[dict[int, _Memory], bool]:
    """Return (memories of the members that this process can map, whether making or mapping a memory failed)."""
    own_file = table[members.index(dist.get_rank())][1]
    memories, failed = {}, own_file < 0 and hasattr(os, "memfd_create")  # without memfd_create it is no failure
    for member, (process, file, token) in zip(members, table):
        try:
            memory = _map_peer(process, file, token)
        except (OSError, ValueError):  # too many open files, no address space
            memory, failed = None, True
        if memory is not None:
            memories[member] = memory
    return memories, failed


def _map_peer(process: int, file: int, token: int) -> _Memory | None:
    """Map another process's memory; None if it is not visible from this process.

    The token in its name distinguishes the file from an unrelated process's file of the same number.
    """
    path = f"/proc/{process}/fd/{file}"
    try:
        if os.readlink(path) != f"/memfd:{_name(token)} (deleted)":
            return None
        opened = os.open(path, os.O_RDWR)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        return _Memory(opened)
    finally:
        os.close(opened)


def _agree(
    members: list[int], reached: Collection[int], failed: bool, group: dist.ProcessGroup
) -> tuple[frozenset[int], list[int]]:
    """Return (members that share memory with this rank, itself included; members that failed), agreed by all of them.

    Only ranks that reach exactly the same members share memory, so that all of them agree on the pairs.
    """
    rank = dist.get_rank(group)
    *columns, failures = _gather([*(int(member in reached) for member in members), failed], group).t()
    seen = torch.stack(columns)
    both = seen & seen.t()
    alike = [bool(both[rank, index]) and torch.equal(both[rank], both[index]) for index in range(len(members))]
    return frozenset(_those(members, alike)), _those(members, failures.tolist())


def _those(members: list[int], chosen: Sequence[int | bool]) -> list[int]:
    return [member for member, is_chosen in zip(members, chosen, strict=True) if is_chosen]


def _open_pipes(
    notices: Notices, members: list[int], reached: frozenset[int], processes: list[int], group: dist.ProcessGroup
) -> tuple[list[int], bool]:
    """Open the pipes between this rank and the members that it reaches; collective over the group.

    Returns:
        (members whose pipe is open, this rank included; whether a pipe could not be created or opened).
    """
    own, failed, files = dist.get_rank(), False, [-1] * len(members)
    try:
        for index, member in enumerate(members):
            if member in reached and member != own:
                files[index] = notices.listen(member)
    except OSError:  # too many open files
        failed = True
    opened = [own] if own in reached else []
    for member, process, file in zip(members, processes, _gather(files, group)[:, members.index(own)].tolist()):
        if file < 0:
            continue
        try:
            notices.open(member, process, file)
            opened.append(member)
        except OSError:
            failed = True
    return opened, failed


def _gather(values: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Gather every member's values: int64 (ranks, values)."""
    rows = [torch.empty(len(values), dtype=torch.int64, device="cpu") for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, torch.tensor(values, device="cpu"), group=group)
    return torch.stack(rows)


def _announce(ranks: list[int]) -> None:
    if ranks:
        warn_rank0(
            f"global ranks {ranks} cannot share memory with others of their host (look at ulimit -n, -f and -v there); "
            "gloo carries their messages, which takes longer."
        )
