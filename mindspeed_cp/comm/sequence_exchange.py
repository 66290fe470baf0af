"""All-to-all between a split of the sequence and a split of the heads.

    heads -> sequence   (seq_local, batch, heads, dim), all heads    -> (seq, batch, heads_local, dim)
    sequence -> heads   (seq, batch, heads_local, dim)               -> (seq_local, batch, heads, dim)

Several tensors travel in one message: for every token, each rank gets its heads of all tensors side by side, or tensor
by tensor if the kernel needs a memory order (``unpack``). After the exchange the sequence is in ascending order,
whatever order the ranks hold: the copy that unpacks also orders the rows.
If each rank holds one range, in rank order, one side of each exchange is a plain slice of sequence-first tensors: there
is one copy before or after the exchange, and none on the other side unless ``unpack`` requires one.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mindspeed_cp.comm.batch import Stamp
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.messages import Message, Pending, as_stored, end_to_end
from mindspeed_cp.comm.meter import record
from mindspeed_cp.kernels.base import MemoryOrder, accumulation_dtype

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a message.

    Args:
        purpose: the purpose for which its bytes count.
        num_heads, dim: heads of the whole tensor, and the head dimension.
        shares: per rank, the heads that it gets: a slice, or a list of indices. Several ranks may get the same head.
    """

    purpose: str
    num_heads: int
    dim: int
    shares: tuple[slice | list[int], ...]

    def count(self, rank: int) -> int:
        share = self.shares[rank]
        return share.stop - share.start if isinstance(share, slice) else len(share)

    def width(self, rank: int) -> int:
        return self.count(rank) * self.dim

    @property
    def total_count(self) -> int:
        """Total number of heads that all ranks get."""
        return sum(map(self.count, range(len(self.shares))))

    @property
    def is_cut(self) -> bool:
        """Whether each head goes to exactly one rank, and each rank's heads are a slice."""
        return self.total_count == self.num_heads and all(isinstance(share, slice) for share in self.shares)


@dataclass(frozen=True, eq=False)
class SequenceExchange:
    """The all-to-all of one Ulysses group for a given sequence.

    Args:
        link: over the group.
        rows: per rank, the (start, stop) ranges of the ascending sequence that it holds, in the order in which it holds
            them.
        alltoall: False replaces the all-to-all by an all-gather of everything and slicing (same results, more bytes).
        unpack: memory order of received heads: None leaves them side by side, "sequence" makes each tensor contiguous,
            "heads" makes (seq, head_dim) of each head contiguous; in both cases the tensors are adjacent.
        stamp, check: sent with the messages that gather the sequence; see ``Link.all_to_all``.
    """

    link: Link
    rows: tuple[Rows, ...]
    alltoall: bool = True
    unpack: MemoryOrder | None = None
    stamp: Stamp | None = None
    check: Callable[[list[Stamp]], None] | None = None

    @property
    def size(self) -> int:
        return self.link.size

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def lengths(self) -> list[int]:
        """Tokens of every rank before the exchange; any lengths, zero included."""
        return [sum(stop - start for start, stop in ranges) for ranges in self.rows]

    def scatter_heads_gather_sequence(
        self, parts: Sequence[Part], tensors: Sequence[torch.Tensor], name: str | None = None
    ) -> Pending[list[torch.Tensor]]:
        """Give every rank its heads of the whole sequence.

        Args:
            parts, tensors: Part and (seq_local, batch, heads, dim) of each tensor of the message.
            name: workspace name of the receive buffers, None for new memory that may be saved.

        Returns:
            Pending of a list of (seq, batch, heads_local, dim).
        """
        like, lengths = tensors[0], self.lengths
        leaving = []
        for rank in range(self.size):
            heads = [tensor[:, :, part.shares[rank]] for part, tensor in zip(parts, tensors)]
            leaving.append(self._message(heads, _consecutive(self.rows[self.rank]), like.dtype, self.unpack))
        results, wholes = self._results(parts, like, name)
        arriving = [self._message(wholes, ranges, like.dtype, self.unpack) for ranges in self.rows]
        batch = like.shape[1]

        def elements(part: Part, source: int, target: int) -> int:
            return lengths[source] * batch * part.width(target)

        return self._trade(parts, leaving, arriving, elements, self.stamp, self.check).then(lambda _: results)

    def scatter_sequence_gather_heads(
        self, parts: Sequence[Part], tensors: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> Pending[list[torch.Tensor]]:
        """Give every rank its tokens of all heads: the inverse, and the gradient, of the other direction.

        Args:
            parts, tensors: Part and (seq, batch, heads_local, dim) of each tensor of the message, this rank's heads.
            dtype: dtype of the messages, whatever the tensors' dtype.

        Returns:
            Pending of a list of new (seq_local, batch, heads, dim). A head that several ranks hold is summed in float32
            (float64 for float64).
        """
        like, batch = tensors[0].new_empty(0, dtype=dtype), tensors[0].shape[1]
        into = [self.all_heads(part, like, batch) for part in parts]
        return self.gather_heads(parts, tensors, into).then(lambda _: [gathered.result() for gathered in into])

    def all_heads(self, whole: Part, like: torch.Tensor, batch: int) -> "AllHeads":
        """An object that gathers this rank's tokens of all heads, in the dtype of ``like``."""
        return AllHeads(whole, like, (self.lengths[self.rank], batch))

    def gather_heads(
        self, parts: Sequence[Part], tensors: Sequence[torch.Tensor], into: "Sequence[AllHeads]"
    ) -> Pending[None]:
        """``scatter_sequence_gather_heads`` for some heads, into objects that gather all of them."""
        dtype, batch, lengths = into[0].dtype, tensors[0].shape[1], self.lengths
        leaving = [self._message(tensors, ranges, dtype) for ranges in self.rows]
        rooms = [gathered.room(part) for part, gathered in zip(parts, into)]
        arriving = [Message((tuple(places[rank] for places in rooms),), dtype) for rank in range(self.size)]

        def elements(part: Part, source: int, target: int) -> int:
            return lengths[target] * batch * part.width(source)

        def add(_: None) -> None:
            for part, gathered, room in zip(parts, into, rooms):
                gathered.take(part, room)

        return self._trade(parts, leaving, arriving, elements).then(add)

    def gather_sequence(self, tensor: torch.Tensor, purpose: str) -> torch.Tensor:
        """All-gather (seq_local, batch, heads, dim) along the sequence into the whole tensor."""
        shards = self.link.gather(tensor, self.lengths, purpose).wait()
        found = Message.joined(Message(((shard,),), tensor.dtype) for shard in shards)
        if self._in_order and len(found.blocks) == 1:
            return found.blocks[0][0]
        whole = tensor.new_empty((sum(self.lengths), *tensor.shape[1:]))
        for rank, shard in enumerate(shards):
            if len(shard):
                self._message([whole], self.rows[rank], tensor.dtype).read(shard.reshape(-1))
        return whole

    @property
    def _in_order(self) -> bool:
        ends = [end for ranges in self.rows for span in ranges for end in span]
        return ends == sorted(ends)

    @staticmethod
    def _message(
        tensors: Sequence[torch.Tensor], ranges: Rows, dtype: torch.dtype, order: MemoryOrder | None = None
    ) -> Message:
        """A message with these rows of the tensors."""
        blocks = [[tensor[start:stop] for tensor in tensors] for start, stop in ranges or ((0, 0),)]
        if order is None:
            return Message(tuple(map(tuple, blocks)), dtype)
        return Message(tuple((as_stored(tensor, order),) for block in blocks for tensor in block), dtype)

    def _results(
        self, parts: Sequence[Part], like: torch.Tensor, name: str | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(tensors (seq, batch, heads_local, dim) in the memory order ``unpack``, tensors to receive into)."""
        seq, batch = sum(self.lengths), like.shape[1]
        shapes = [(seq, batch, part.count(self.rank), part.dim) for part in parts]
        widths = [part.width(self.rank) for part in parts]
        whole_shape = seq, batch, sum(widths)
        if name is None:
            whole = like.new_empty(whole_shape)
        else:
            whole = self.link.workspace.get(name, whole_shape, like.dtype, like.device)
        if self.unpack is None:
            columns = whole.split(widths, dim=-1)
            return [column.unflatten(-1, shape[2:]) for column, shape in zip(columns, shapes)], [whole]
        results = list(end_to_end(whole.view(-1), shapes, self.unpack))
        return results, results

    def _trade(
        self,
        parts: Sequence[Part],
        leaving: Sequence[Message],
        arriving: Sequence[Message],
        elements: Callable[[Part, int, int], int],
        stamp: Stamp | None = None,
        check: Callable[[list[Stamp]], None] | None = None,
    ) -> Pending[None]:
        """All-to-all, or gather every rank's whole message and take this rank's slices.

        Args:
            elements: (part, source, target) -> number of elements of the part in the message between them.
        """
        ranks = range(self.size)
        if self.alltoall:
            pending = self.link.all_to_all(leaving, arriving, "heads and sequence", stamp, check)
        else:
            table = [[sum(elements(part, source, to) for part in parts) for to in ranks] for source in ranks]
            pending = self._gathered(leaving, arriving, table)
        sent: Counter[str] = Counter()
        for part in parts:
            size = sum(elements(part, self.rank, to) for to in (self.link.peers if self.alltoall else ranks))
            sent[part.purpose] += size * leaving[0].dtype.itemsize * (1 if self.alltoall else self.size - 1)
        record(sent)
        return pending

    def _gathered(
        self, leaving: Sequence[Message], arriving: Sequence[Message], table: Sequence[Sequence[int]]
    ) -> Pending[None]:
        """table: (source, target) -> number of elements of the message between them."""
        packed = Message.joined(leaving)
        send = packed.in_place
        if send is None:
            send = leaving[self.rank].blocks[0][0].new_empty(packed.numel, dtype=packed.dtype)
            packed.write(send)
        pending = self.link.gather(send, [sum(row) for row in table], "gathered", count=False)

        def unpack(messages: list[torch.Tensor]) -> None:
            for source, message in enumerate(arriving):
                start = sum(table[source][: self.rank])
                message.read(messages[source][start : start + message.numel])

        return pending.then(unpack)


def _consecutive(ranges: Rows) -> Rows:
    """The positions of these ranges when they are concatenated."""
    ends = [0, *itertools.accumulate(stop - start for start, stop in ranges)]
    return tuple(zip(ends, ends[1:]))


class AllHeads:
    """This rank's tokens (seq_local, batch, heads, dim) of all heads, which arrive in one or several exchanges.

    If each head goes to one rank, arriving heads are written in place. A head that several ranks hold is summed in
    float32 (float64 for float64), in the order of exchanges and ranks.
    """

    def __init__(self, whole: Part, like: torch.Tensor, rows: tuple[int, int]) -> None:
        """whole: the part for all exchanges together; like: gives dtype and device; rows: (seq_local, batch)."""
        self._whole, self._like, self._rows = whole, like, rows
        self._shape = (*rows, whole.num_heads, whole.dim)
        self._heads: torch.Tensor | None = like.new_empty(self._shape) if whole.is_cut else None

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    def room(self, part: Part) -> list[torch.Tensor]:
        """Per rank, the tensor to receive its heads into."""
        if self._heads is not None and self._whole.is_cut:
            return [self._heads[:, :, share] for share in part.shares]
        counts = [part.count(rank) for rank in range(len(part.shares))]
        return list(self._like.new_empty((*self._rows, part.total_count, part.dim)).split(counts, dim=2))

    def take(self, part: Part, room: Sequence[torch.Tensor]) -> None:
        """Called when the heads have arrived in ``room``."""
        if self._whole.is_cut:
            return
        if self._heads is None:
            self._heads = self._like.new_zeros(self._shape, dtype=accumulation_dtype(self.dtype))
        heads = torch.arange(part.num_heads, device=self._heads.device)
        for share, received in zip(part.shares, room):
            self._heads.index_add_(2, heads[share], received.to(self._heads.dtype))

    def result(self) -> torch.Tensor:
        assert self._heads is not None, "an exchange has ended"
        return self._heads.to(self.dtype)
