"""CPU tensors from rank to rank of one host through shared memory, with a notice for each message (``comm.notices``).

gloo sends a message through the host's network stack, which copies it twice and wakes threads for every part. Here the
sender writes it into memory that its peers see and tells them where; the receiver reads it where it is and marks it as
read. A dead peer is noticed by its pipe.

    a rank's memory = messages, each at the lowest free place: one mark for every member | data

Every rank has one piece of memory: an anonymous file of SPAN bytes, of which only what was once used is backed by
pages. Peers map all of it when the groups are made and keep it mapped. So nothing is opened later, and nothing can
fail later: a message whose notice has left arrives, whatever its sender does next (end by os._exit included), and
nothing is left behind when the last process ends. Where there is no room, the notice says that gloo carries the
message.

Ranks on other hosts, or in containers that do not see each other, are not reached; gloo carries their messages. Linux
only. Tried on x86-64; the marks rely on the processor finishing a read before a store that is thousands of instructions
later, which holds on Arm too.
"""

import mmap
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_cp.comm.messages import Message
from mindspeed_cp.comm.notices import Notices, seconds_of
from mindspeed_cp.settings.notices import warn_rank0, warn_this_rank

SPAN = 1 << 36  # bytes of address space for what one rank sends; 64 GiB, and a thousand ranks fit into one process
SMALLEST_MESSAGE = 1 << 14  # bytes; below this the message itself is as cheap as its notice
LINE = 64  # bytes of a cache line, to which messages are aligned


@dataclass(frozen=True)
class Parcel:
    """A message in this rank's memory.

    Args:
        start, stop: bytes of the memory that it takes, its marks included.
        marks: words that its readers set.
        data: uint8 (num_bytes,), to be written before the notice is sent.
    """

    start: int
    stop: int
    marks: tuple[int, ...]
    data: torch.Tensor


class _Memory:
    """One rank's memory as this process sees it: ``data``, uint8, and the same memory as ``words`` of 8 bytes."""

    def __init__(self, file: int):
        mapped = mmap.mmap(file, SPAN)
        mapped.madvise(mmap.MADV_DONTDUMP)  # a core file need not hold what the peers hold too
        self.words = memoryview(mapped).cast("q")
        with torch.inference_mode(False):  # memory mapped during inference could not be written during training
            self.data = torch.frombuffer(mapped, dtype=torch.uint8)


class HostMemory:
    """Shared memory between this rank and the members of a group that run on the same host; make it with ``connect``.

    Attributes:
        peers: global ranks that are reached.
        smallest: messages of fewer bytes go through gloo.
        num_bytes: shared memory that this rank holds.
        notices: what ranks tell each other of their messages.
    """

    def __init__(
        self, members: list[int], file: int, memories: dict[int, _Memory], smallest: int, notices: Notices
    ) -> None:
        self._slot = {rank: index for index, rank in enumerate(members)}
        self._marks = -(-8 * len(members) // LINE) * LINE  # bytes before the data
        self._file, self._memories, self._own = file, memories, memories[dist.get_rank()]
        self.peers, self.smallest = frozenset(memories) - {dist.get_rank()}, smallest
        self._unread: list[Parcel] = []  # ascending in memory
        self.num_bytes, self.notices = 0, notices

    @classmethod
    def connect(cls, group: dist.ProcessGroup, smallest: int = SMALLEST_MESSAGE) -> "HostMemory | None":
        """Find out which members of ``group`` share memory with this rank; collective over the group.

        Returns:
            None where there is nobody, or the group's back end is not gloo.
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
        """Whether such a message with ``peer`` goes through shared memory, if there is room; both ends answer alike."""
        return peer in self.peers and device.type == "cpu" and num_bytes >= max(self.smallest, 1)

    def place(self, readers: list[int], num_bytes: int) -> Parcel | None:
        """Room for a message to the global ranks ``readers``, at the lowest place that is free; None where there is
        none.

        What has been read is free. A rank that never waits for a slow peer so needs more memory meanwhile, and all
        others the same places, whose pages are there already, again and again.
        """
        size = self._marks + -(-num_bytes // LINE) * LINE
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
        data = self._own.data[start + self._marks : start + self._marks + num_bytes]
        parcel = Parcel(start, start + size, marks, data)
        self._unread.insert(index, parcel)
        return parcel

    def _backed(self, stop: int) -> bool:
        """Make sure that memory up to ``stop`` has pages; without, a write into it would end the process."""
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

    def write(self, readers: list[int], message: Message) -> Parcel | None:
        """A Parcel for ``readers`` that holds a copy of the message, None where there is no room."""
        parcel = self.place(readers, message.num_bytes)
        if parcel is not None:
            message.write(parcel.data.view(message.dtype))
        return parcel

    def read(self, peer: int, start: int, num_bytes: int) -> torch.Tensor:
        """uint8, the message at ``start`` of the peer's memory, valid until ``release``."""
        return self._memories[peer].data[start + self._marks : start + self._marks + num_bytes]

    def release(self, peer: int, start: int) -> None:
        """Tell the peer that its message has been read."""
        self._memories[peer].words[start // 8 + self._slot[dist.get_rank()]] = 1

    def close(self) -> None:
        """Give the memory back; what peers have mapped stays theirs until they close."""
        if self._memories:
            os.close(self._file)
            self.notices.close()
            del self._own
        self.peers, self._unread, self._memories = frozenset(), [], {}

    __del__ = close


def _name(token: int) -> str:
    return f"mindspeed_cp-{token}"


def _create_file(name: str) -> int:
    """A file of SPAN bytes, or -1 where the system has no anonymous files or forbids them or their size."""
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
    """(memories of the members that are seen from here, whether this rank's could not be made or one not be mapped)."""
    own_file = table[members.index(dist.get_rank())][1]
    memories, failed = {}, own_file < 0 and hasattr(os, "memfd_create")  # where there is none, nobody expects it
    for member, (process, file, token) in zip(members, table):
        try:
            memory = _map_peer(process, file, token)
        except (OSError, ValueError):  # too many open files, no address space
            memory, failed = None, True
        if memory is not None:
            memories[member] = memory
    return memories, failed


def _map_peer(process: int, file: int, token: int) -> _Memory | None:
    """Another process's memory, None where it is not seen from here.

    The token in its name tells the file from a stranger's of the same number.
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
    """(members that share with this rank, itself included; members that failed), as all of them see it.

    Only ranks that reach the very same members share: then all of them agree on who does with whom.
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
    """Make the pipes between this rank and those that it reaches; collective over the group.

    Returns:
        (members whose pipe is open here, this rank included; whether one could not be made or opened).
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
    """(ranks, values) int64: every member's values."""
    rows = [torch.empty(len(values), dtype=torch.int64, device="cpu") for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, torch.tensor(values, device="cpu"), group=group)
    return torch.stack(rows)


def _announce(ranks: list[int]) -> None:
    if ranks:
        warn_rank0(
            f"global ranks {ranks} cannot share memory with others of their host (look at ulimit -n, -f and -v there); "
            "gloo carries their messages, which takes longer."
        )
