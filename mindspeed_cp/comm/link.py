"""``Link``: one process group seen from one rank. This package uses only its three kinds of transfers.

    exchange      messages between single ranks, at most one for each peer and direction
    gather        every rank's tensor to all ranks
    all_to_all    a message from every rank to every other

Each is posted without waiting and returns a ``Pending``; computation before its ``wait`` hides it. Empty messages are
skipped on both sides, which know each other's sizes. An error names the ranks that did not answer.

Between ranks of one host, large messages of CPU tensors go through shared memory, the link's carrier. This does not
change results, order or counted bytes.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.comm.batch import Batch, Stamp
from mindspeed_cp.comm.host_memory import HostMemory
from mindspeed_cp.comm.messages import Message, Pending, copy_message
from mindspeed_cp.comm.meter import named, record, wait_for
from mindspeed_cp.comm.posting import Loans, Member
from mindspeed_cp.comm.workspace import Workspace

# torch 2.13 renames the collective and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Back ends that announce receives to a peer after earlier sends to it: if receives are not posted before sends, the two
# directions of a pair run one after the other. gloo's own all-to-all has this problem, so single messages replace it
# here. HCCL, in contrast, sends single messages one after another, and its collective uses all links.
ANNOUNCE_FIRST = ("gloo",)
OVERTAKING = 1 << 30  # tag of messages that may be received before earlier ones; the tags of notices count from 1

Ends = Sequence[tuple[int, Sequence[torch.Tensor]]]  # ranks, and the tensors sent to or received from them


@dataclass(frozen=True, eq=False)
class Link(Member):
    """One process group seen from one rank, and the transfers in it."""

    def exchange(
        self,
        sends: Ends,
        receives: Ends,
        purpose: str,
        add_in: torch.dtype | None = None,
        tag: int = 0,
    ) -> Pending[None]:
        """Send and receive messages.

        Args:
            sends, receives: (rank, tensors that are concatenated in the message); every rank at most once. Contiguous
                tensors are sent without a copy.
            purpose: name under which bytes are counted; a suffix after a dot distinguishes streams and is not counted.
            add_in: dtype of messages that ``wait`` adds to the tensors of ``receives``; None for messages in the
                tensors' own dtype, which overwrite them.
            tag: messages with the same tag arrive in order.
        """
        return self.exchange_several([(sends, receives)], purpose, add_in, tag)[0]

    def expect(self, receives: Ends, purpose: str, add_in: torch.dtype | None = None) -> Pending[None] | None:
        """Post receives early, so that the peers can send as soon as they are ready. Returns None if this would delay
        later messages in the back end; the receives must then be part of the exchange."""
        if self.backend not in ANNOUNCE_FIRST or self.one_by_one:
            return None
        return self.exchange((), receives, purpose, add_in, OVERTAKING)

    def exchange_several(
        self,
        exchanges: Sequence[tuple[Ends, Ends]],
        purpose: str,
        add_in: torch.dtype | None = None,
        tag: int = 0,
    ) -> list[Pending[None]]:
        """Post several exchanges at once; await each separately, in their order."""
        batches = [self._batch(sends, receives, purpose, add_in, tag) for sends, receives in exchanges]
        if len(batches) > 1 and self.backend in ANNOUNCE_FIRST and not self.one_by_one:
            Batch.post(*batches)
        else:
            for batch in batches:
                Batch.post(batch)
        return [Pending(batch.finish) for batch in batches]

    def _batch(self, sends: Ends, receives: Ends, purpose: str, add_in: torch.dtype | None, tag: int) -> Batch:
        for ends in (sends, receives):
            assert len({rank for rank, _ in ends}) == len(ends), "two messages for one rank in a batch"
        batch = Batch(self, purpose, tag=tag)
        for rank, tensors in receives:
            batch.receive(rank, _end_to_end(tensors, add_in, adds=add_in is not None))
        for rank, tensors in sends:
            message = _end_to_end(tensors, add_in)
            batch.send(rank, message)
            if message.numel:
                record({batch.purpose: message.num_bytes})
        return batch

    def gather(
        self, tensor: torch.Tensor, lengths: Sequence[int], purpose: str, name: str | None = None, count: bool = True
    ) -> Pending[list[torch.Tensor]]:
        """Gather every rank's rows on all ranks; the result is a list in rank order.

        Args:
            tensor: (lengths[rank], ...), padded here to the longest if lengths differ.
            name: workspace name of the received tensors, None for new memory.
            count: False lets the caller count the bytes.
        """
        longest, borrowed = max(lengths), None
        shape = (self.size, longest, *tensor.shape[1:])
        if name is None:
            gathered = tensor.new_empty(shape)
        else:
            gathered = self.workspace.get(name, shape, tensor.dtype, tensor.device)
        shards = [shard[:length] for shard, length in zip(gathered, lengths)]
        size = gathered[0].numel() * tensor.element_size()
        if count:
            record({purpose.partition(".")[0]: size * (self.size - 1)})
        if self.shares_memory(tensor.device, size):
            return self._gather_through_memory(tensor, shards, purpose)
        padded = tensor.contiguous()
        if len(tensor) < longest:
            borrowed = self.workspace.borrow(gathered[0].numel(), tensor.dtype, tensor.device)
            padded = borrowed[: gathered[0].numel()].view(gathered[0].shape)
            padded[: len(tensor)] = tensor
        finish = self._gather_at_once(gathered, padded, purpose)

        def finished() -> list[torch.Tensor]:
            finish()
            if borrowed is not None:
                self.workspace.give_back(borrowed)
            return shards

        return Pending(finished)

    def all_to_all(
        self,
        leaving: Sequence[Message],
        arriving: Sequence[Message],
        purpose: str,
        stamp: Stamp | None = None,
        check: Callable[[list[Stamp]], None] | None = None,
        by_messages: bool = False,
    ) -> Pending[None]:
        """Exchange messages with every rank; the caller counts the bytes.

        Args:
            leaving, arriving: the message to, and from, each rank, this one included. A size is the product of a number
                of the sender and one of the receiver, such as rows times heads.
            stamp: numbers that every rank sends to the others with its messages, if ``tells`` allows it.
            by_messages: use single messages if the back end's own all-to-all leaves links idle.
            check: called with all ranks' stamps in rank order before anything is unpacked; it may raise.
        """
        if (
            stamp is None
            and not (by_messages and self.backend in ANNOUNCE_FIRST)
            and not self.shares_memory(leaving[self.rank].device)
        ):
            return self._all_to_all_at_once(leaving, arriving, purpose)
        batch = Batch(self, purpose, stamp, check)
        for rank in self.peers:
            batch.receive(rank, arriving[rank])
        for rank in self.peers:
            batch.send(rank, leaving[rank])
        Batch.post(batch)
        own = leaving[self.rank], arriving[self.rank]  # keeps no other leaving message alive
        if check is None:
            copy_message(*own)  # leaving tensors may change after this
            return Pending(batch.finish)
        return Pending(batch.finish).then(lambda _: copy_message(*own))

    def tells(self, device: torch.device) -> bool:
        """Whether stamps are sent with messages of this device: only gloo's messages can have notices."""
        return device.type == "cpu" and self.backend == "gloo"

    def shares_memory(self, device: torch.device, size: int | None = None) -> bool:
        """Whether all peers share memory with this rank, and messages of ``size`` bytes use it."""
        carrier, peers = self.carrier, [self.global_ranks[rank] for rank in self.peers]
        if carrier is None or device.type != "cpu" or not carrier.peers.issuperset(peers):
            return False
        return size is None or all(carrier.carries(peer, device, size) for peer in peers)

    def _gather_through_memory(
        self, tensor: torch.Tensor, shards: list[torch.Tensor], purpose: str
    ) -> Pending[list[torch.Tensor]]:
        assert self.carrier is not None, "the peers share memory"
        batch = Batch(self, purpose)
        message = Message(((tensor,),), tensor.dtype)
        for rank in self.peers:
            batch.receive(rank, Message(((shards[rank],),), tensor.dtype), announced=True)
        if tensor.numel():
            parcel = self.carrier.write([self.global_ranks[rank] for rank in self.peers], message)
            for rank in self.peers:
                batch.send(rank, message, announced=True, parcel=parcel)
        Batch.post(batch)
        shards[self.rank].copy_(tensor)
        return Pending(batch.finish).then(lambda _: shards)

    def _all_to_all_at_once(
        self, leaving: Sequence[Message], arriving: Sequence[Message], purpose: str
    ) -> Pending[None]:
        """Use one collective; messages that are not contiguous over all ranks are packed into and out of one buffer."""
        sizes = [[message.numel for message in messages] for messages in (arriving, leaving)]
        if len({*sizes[0], *sizes[1]}) == 1 and sizes[0][0]:
            sizes = []  # equal on all ranks, for which HCCL has an operator
        outgoing, incoming = Message.joined(leaving), Message.joined(arriving)
        like, loans = leaving[self.rank].tensors[0], Loans(self.workspace)
        send, received = loans.written(outgoing, like), loans.flat(incoming, like)
        finish = self._trade_at_once(received, send, sizes, purpose)

        def finished() -> None:
            finish()
            if incoming.in_place is None:
                incoming.read(received)
            loans.give_back()

        return Pending(finished)

    def _gather_at_once(self, gathered: torch.Tensor, own: torch.Tensor, purpose: str) -> Callable[[], None]:
        return self._start(
            purpose, own.device, lambda: _all_gather(gathered.flatten(0, 1), own, self.group, async_op=True)
        )

    def _trade_at_once(
        self, received: torch.Tensor, sent: torch.Tensor, sizes: list[list[int]], purpose: str
    ) -> Callable[[], None]:
        """sizes: elements (from, to) every rank, or empty if all are equal."""
        arriving, leaving = sizes or (None, None)
        return self._start(
            purpose,
            sent.device,
            lambda: dist.all_to_all_single(received, sent, arriving, leaving, group=self.group, async_op=True),
        )

    def _start(self, purpose: str, device: torch.device, collective: Callable[[], Any]) -> Callable[[], None]:
        """Start a collective; return a function that waits for it."""
        self.check_uninterrupted()
        with self.naming(purpose, self.peers), named(f"post {purpose}"):
            work = collective()

        def finish() -> None:
            with self.naming(purpose, self.peers):
                wait_for(work, device)

        return finish


def _end_to_end(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None, adds: bool = False) -> Message:
    if dtype is None:
        dtype = tensors[0].dtype if tensors else torch.float32
    message = Message(tuple((tensor,) for tensor in tensors), dtype, adds)
    return message if adds or len(tensors) == 1 else Message.joined([message])


# Process group made elsewhere, while it exists -> (workspace, carrier).
_memories: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[Workspace, HostMemory | None]] = (
    weakref.WeakKeyDictionary()
)


def link_of(group: dist.ProcessGroup | None) -> Link:
    """Return the link over a group made elsewhere; None is the default group. The first call is collective.

    All links of a group share their buffers.

    Raises:
        ValueError: the group was destroyed.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None, "torch.distributed is not initialized"
    ranks = ranks_of(group)
    if group not in _memories:
        _memories[group] = Workspace(), HostMemory.connect(group)
    return Link(group, dist.get_rank(group), ranks, *_memories[group])


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Return the global ranks of a group made elsewhere; raise ValueError if it was destroyed."""
    try:
        return tuple(dist.get_process_group_ranks(group))
    except KeyError:
        raise ValueError(
            "the process group was destroyed (destroy_process_group), and attention over it is called afterwards; "
            "build the module with a group that exists."
        ) from None


def within(link: Link, group: dist.ProcessGroup, global_ranks: Sequence[int]) -> Link:
    """Return a link over some of ``link``'s ranks, over ``group`` (theirs or the same), with the same buffers."""
    ranks = tuple(global_ranks)
    return replace(link, group=group, rank=ranks.index(dist.get_rank()), global_ranks=ranks)
