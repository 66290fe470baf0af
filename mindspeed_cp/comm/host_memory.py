"""CPU tensors from rank to rank of one host through shared memory, with gloo for the notices.

gloo sends a large message through the host's network stack, which copies it twice and wakes threads for every part.
Here the sender writes it into a segment of shared memory and sends a notice of 32 bytes; the receiver reads the segment
where it is and marks it as read. A dead peer is noticed as ever, because every notice is a message.

    segment = one slot for each reader (number of the last message it has read) | data

A segment is an anonymous file that peers open through /proc: nothing is left behind when a process ends, and the size
of /dev/shm does not matter. Ranks on other hosts, or in containers that do not see each other, are not reached; gloo
carries their messages. Linux only. Tried on x86-64; the slots rely on the processor finishing a read before a store
that is thousands of instructions later, which holds on Arm too.
"""

import itertools
import mmap
import os
import secrets
import time
import weakref

import torch
import torch.distributed as dist

HEADER_BYTES = 4096  # 512 slots; a whole page keeps the data aligned
SMALLEST_MESSAGE = 1 << 14  # bytes; below this the message itself is as cheap as its notice
FAREWELL = 2.0  # seconds that a rank which leaves gives its peers to read what it sent last
PATIENCE = 1.0  # seconds to wait for a segment before a further one is made
POLL = 1e-4

_serials = itertools.count()


def _create_file(name):
    """A file descriptor, or -1 where the system has no anonymous files or forbids them."""
    try:
        return os.memfd_create(name)
    except (AttributeError, OSError):
        return -1


def _map_file(file):
    """(slots int64, data uint8) of a segment's file as it is now."""
    with torch.inference_mode(False):  # memory mapped during inference could not be written during training
        flat = torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)
    return flat[:HEADER_BYTES].view(torch.int64), flat[HEADER_BYTES:]


class Segment:
    """Memory that this rank writes and its readers read, one message at a time.

    Attributes:
        data: (at least the message's bytes,) uint8, to be written before the notice is sent.
    """

    def __init__(self):
        self._serial = next(_serials)
        self._file = os.memfd_create(_name(self._serial))
        self._number, self._size, self._readers = 0, 0, []
        weakref.finalize(self, os.close, self._file).atexit = False  # the process's end closes it, after the farewell
        self._resize(0)

    def _resize(self, num_bytes):
        os.ftruncate(self._file, HEADER_BYTES + num_bytes)
        self._slots, self.data = _map_file(self._file)

    def begin(self, readers, num_bytes):
        """Take the segment, which must be free, for one message to the readers with these slots."""
        if self.data.numel() < num_bytes:
            self._resize(num_bytes)
        self._number, self._size, self._readers = self._number + 1, num_bytes, readers

    def view(self, like):
        """The message's memory as a flat tensor with the size and dtype of ``like``."""
        return self.data[: like.numel() * like.element_size()].view(like.dtype)

    def notice(self):
        """int64 (4,) for every reader: where the message is, which segment that is, the message's number and bytes."""
        return torch.tensor([self._file, self._serial, self._number, self._size], device="cpu")

    @property
    def num_bytes(self):
        return HEADER_BYTES + self.data.numel()

    @property
    def is_free(self):
        return all(self._slots[reader] == self._number for reader in self._readers)


class HostMemory:
    """Shared memory between this rank and the members of a group that run on the same host; make it with ``connect``.

    Attributes:
        peers: global ranks that are reached.
        smallest: messages of fewer bytes go through gloo.
    """

    def __init__(self, members, processes, peers, smallest):
        self._slot = {rank: index for index, rank in enumerate(members)}
        self._processes, self.peers, self.smallest = dict(zip(members, processes)), peers, smallest
        self._streams, self._mapped = {}, {}
        weakref.finalize(self, _farewell, self._streams)

    @classmethod
    def connect(cls, group, smallest=SMALLEST_MESSAGE):
        """Find out which members of ``group`` share memory with this rank; collective over the group.

        Returns:
            None where there is nobody, or the group's back end is not gloo.
        """
        members = dist.get_process_group_ranks(group)
        if dist.get_backend(group) != "gloo" or len(members) > HEADER_BYTES // 8:
            return None
        token = secrets.randbits(62)
        file = _create_file(_name(token))
        table = _gather([os.getpid(), file, token], group)
        reached = _gather([int(_reaches(*row)) for row in table.tolist()], group)
        if file >= 0:
            os.close(file)  # every rank has tried to open it, or the last gathering would not have ended
        both = (reached & reached.t()).fill_diagonal_(1)
        rank = dist.get_rank(group)
        # Only ranks that reach the very same members: then all of them agree on who shares memory with whom.
        peers = frozenset(
            peer
            for index, peer in enumerate(members)
            if index != rank and both[rank, index] and torch.equal(both[rank], both[index])
        )
        return cls(members, table[:, 0].tolist(), peers, smallest) if peers else None

    def carries(self, peer, tensor):
        """Whether a message with ``peer`` that fills ``tensor`` goes through shared memory; both ends answer alike."""
        size = tensor.numel() * tensor.element_size()
        return peer in self.peers and tensor.device.type == "cpu" and size >= max(self.smallest, 1)

    def outgoing(self, stream, readers, num_bytes):
        """A free Segment for a message of ``num_bytes`` to the global ranks ``readers``.

        Two segments of each stream take turns, so memory does not depend on the number of ranks: what was sent two
        messages ago has been read by now, unless a peer is far behind. Then a further segment joins, because what is
        unread must stay.
        """
        if stream not in self._streams:
            self._streams[stream] = [Segment(), Segment()]
        segments = self._streams[stream]
        segment = segments[0]
        if not _wait_until(lambda: segment.is_free, PATIENCE):
            segment = next((other for other in segments if other.is_free), None) or Segment()
        segments[:] = [*(other for other in segments if other is not segment), segment]
        segment.begin([self._slot[reader] for reader in readers], num_bytes)
        return segment

    def write(self, stream, readers, tensor):
        """A Segment for ``readers`` that holds a copy of a contiguous tensor."""
        segment = self.outgoing(stream, readers, tensor.numel() * tensor.element_size())
        segment.view(tensor).copy_(tensor.view(-1))
        return segment

    @property
    def num_bytes(self):
        """Shared memory that this rank holds."""
        return sum(segment.num_bytes for segments in self._streams.values() for segment in segments)

    def read(self, peer, notice, num_bytes):
        """uint8 (num_bytes,) in the peer's memory, valid until ``release``.

        Raises:
            RuntimeError: the peer sent another number of bytes.
            OSError: its memory is gone.
        """
        file, serial, _, size = notice.tolist()
        if size != num_bytes:
            raise RuntimeError(f"rank {peer} sent {size} bytes where {num_bytes} were expected")
        mapped = self._mapped.get((peer, serial))
        if mapped is None or mapped[1].numel() < num_bytes:  # new, or grown since
            opened = _open(self._processes[peer], file, serial)
            try:
                mapped = self._mapped[peer, serial] = _map_file(opened)
            finally:
                os.close(opened)
        return mapped[1][:num_bytes]

    def release(self, peer, notice):
        """Tell the peer that its message has been read."""
        _, serial, number, _ = notice.tolist()
        self._mapped[peer, serial][0][self._slot[dist.get_rank()]] = number

    def close(self):
        """Wait a little for unread messages, then give the memory back."""
        _farewell(self._streams)
        self._streams.clear()
        self._mapped.clear()


def _name(token):
    return f"mindspeed_cp-{token}"


def _open(process, file, token):
    """Open another process's file; the token in its name tells it from a stranger's, or a later one, of the same
    number.
    """
    path = f"/proc/{process}/fd/{file}"
    if os.readlink(path) != f"/memfd:{_name(token)} (deleted)":
        raise OSError(f"{path} is not the memory that was announced")
    return os.open(path, os.O_RDWR)


def _reaches(process, file, token):
    try:
        os.close(_open(process, file, token))
    except OSError:
        return False
    return True


def _gather(values, group):
    """(ranks, values) int64: every member's values."""
    rows = [torch.empty(len(values), dtype=torch.int64, device="cpu") for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, torch.tensor(values, device="cpu"), group=group)
    return torch.stack(rows)


def _farewell(streams):
    """Return when all messages have been read, or after FAREWELL seconds: a peer may have ended without reading."""
    _wait_until(lambda: all(segment.is_free for segments in streams.values() for segment in segments), FAREWELL)


def _wait_until(condition, seconds):
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True
