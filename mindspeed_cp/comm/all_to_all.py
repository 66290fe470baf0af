"""All-to-all that trades a split of the sequence for a split of the heads, and back.

    heads -> sequence   (seq_local, batch, heads, dim), all heads    -> (seq, batch, heads_local, dim)
    sequence -> heads   (seq, batch, heads_local, dim)               -> (seq_local, batch, heads, dim)

Several tensors travel in one message: each rank gets, for every token, its heads of all of them side by side.
Sequence-first tensors make one side of each exchange a plain slice: one copy before or after it and none on the other
side, unless the kernel wants its heads apart (``unpack``). ``start_...`` posts an exchange and returns a ``Pending``;
what is computed before its ``wait`` hides it.

Between ranks of one host a message is packed into shared memory and unpacked from there: nothing else is copied, and
what a rank keeps for itself is never packed.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_cp.comm.counters import record
from mindspeed_cp.comm.messages import Message, Pending, Slab, fill, heads_of
from mindspeed_cp.comm.transport import all_gather, all_to_all, post


@dataclass(frozen=True, eq=False)
class SequenceExchange:
    """The all-to-all of one Ulysses group for a given sequence.

    Args:
        group: process group; rank: this rank in it.
        lengths: tokens of every rank before the exchange, in rank order; any lengths, zero included.
        workspace: reused send and receive buffers.
        alltoall: False replaces the all-to-all by an all-gather of everything and slicing (same numbers, more bytes).
        host: HostMemory that may reach the group's ranks, or None.
        unpack: how received heads lie in memory: None leaves them side by side, "sequence" makes each tensor
            contiguous, "heads" makes (seq, head_dim) of each head contiguous.
    """

    group: object
    rank: int
    lengths: tuple[int, ...]
    workspace: object
    alltoall: bool = True
    host: object = None
    unpack: str | None = None

    @property
    def size(self):
        return len(self.lengths)

    def scatter_heads_gather_sequence(self, parts, tensors, name=None):
        """``start_scatter_heads_gather_sequence``, awaited at once."""
        return self.start_scatter_heads_gather_sequence(parts, tensors, name).wait()

    def scatter_sequence_gather_heads(self, parts, tensors, dtype):
        """``start_scatter_sequence_gather_heads``, awaited at once."""
        return self.start_scatter_sequence_gather_heads(parts, tensors, dtype).wait()

    def start_scatter_heads_gather_sequence(self, parts, tensors, name=None, turn=0):
        """Give every rank its heads of the whole sequence.

        Args:
            parts, tensors: Part and (seq_local, batch, heads, dim) of each tensor of the message.
            name: workspace name of what is received, None for fresh memory that may be saved.
            turn: 0 or 1, another one for each of two exchanges that are under way at once.

        Returns:
            Pending of a list of (seq, batch, heads_local, dim).
        """
        like, (rows, batch) = tensors[0], tensors[0].shape[:2]

        def pieces(rank):
            return [tensor[:, :, part.shares[rank]] for part, tensor in zip(parts, tensors)]

        def packed():
            send = self._buffer(f"a2a.send{turn}", (sum(slab.size for slab in leaving),), like)
            for rank, flat in enumerate(send.split([slab.size for slab in leaving])):
                fill(leaving[rank].apart(flat), pieces(rank))
            return send

        leaving = [Slab(rows, batch, heads_of(parts, rank)) for rank in range(self.size)]
        whole = Slab(sum(self.lengths), batch, heads_of(parts, self.rank))
        arriving = [Slab(length, batch, whole.heads) for length in self.lengths]
        into = self._buffer(name, (whole.size,), like) if self.unpack is None else None
        arrived = self._start(Message(like, pieces, packed, leaving, arriving), turn, into)
        self._record(parts, [[rows * batch * part.width(rank) for rank in range(self.size)] for part in parts], like)

        def finish():
            results = self._unpacked(whole, name, like) if into is None else whole.apart(into)
            with arrived() as received:
                for rank, parts_of_rank in received:
                    fill([result[self._rows(rank)] for result in results], parts_of_rank)
            return results

        return Pending(finish)

    def start_scatter_sequence_gather_heads(self, parts, tensors, dtype):
        """Give every rank its tokens of all heads: the inverse, and the gradient, of the other direction.

        Args:
            parts, tensors: Part and (seq, batch, heads_local, dim) of each tensor of the message, this rank's heads.
            dtype: what is sent, whatever the tensors' own dtype.

        Returns:
            Pending of a list of fresh (seq_local, batch, heads, dim). A head that several ranks hold is summed in
            float32 (float64 for float64).
        """
        batch, like = tensors[0].shape[1], tensors[0].new_empty(0, dtype=dtype)

        def pieces(rank):
            return [tensor[self._rows(rank)] for tensor in tensors]

        leaving = [Slab(length, batch, heads_of(parts, self.rank)) for length in self.lengths]
        arriving = [Slab(self.lengths[self.rank], batch, heads_of(parts, rank)) for rank in range(self.size)]
        arrived = self._start(
            Message(like, pieces, lambda: _pack_heads(tensors, dtype, self.workspace), leaving, arriving), turn=0
        )
        self._record(
            parts, [[length * batch * part.width(self.rank) for length in self.lengths] for part in parts], like
        )

        def finish():
            with arrived() as received:
                by_rank = [parts_of_rank for _, parts_of_rank in sorted(received)]
                return [
                    _join_heads(part, [pieces[index] for pieces in by_rank], like) for index, part in enumerate(parts)
                ]

        return Pending(finish)

    def gather_sequence(self, purpose, tensor):
        """All-gather (seq_local, batch, heads, dim) along the sequence into a fresh tensor; uneven lengths are
        padded.
        """
        longest, tail = max(self.lengths), tensor.shape[1:]
        padded = self.workspace.get("gather.send", (longest, *tail), tensor.dtype, tensor.device)
        padded[: tensor.shape[0]] = tensor
        gathered = tensor.new_empty((self.size * longest, *tail))
        all_gather(gathered, padded, self.group, purpose, self.host).wait()
        if min(self.lengths) == longest:
            return gathered
        return torch.cat([shard[:length] for shard, length in zip(gathered.split(longest), self.lengths)])

    def _start(self, message, turn, into=None):
        """Post a message; returns () -> context manager of a list of (source rank, list of (rows, batch, heads, dim)).

        Args:
            into: flat buffer for all that arrives, in rank order. A collective fills it outright and the list is empty.
        """
        if not self.alltoall:
            return lambda: self._gather_and_slice(message)
        peers = dist.get_process_group_ranks(self.group)
        others = [(rank, peer) for rank, peer in enumerate(peers) if rank != self.rank]
        if self.host and self.host.peers.issuperset(peer for _, peer in others) and message.like.device.type == "cpu":
            return self._start_on_host(message, others, turn)
        sizes = [slab.size for slab in message.arriving]
        received = self._buffer(f"a2a.receive{turn}", (sum(sizes),), message.like) if into is None else into
        transfer = all_to_all(
            received, message.packed(), sizes, [slab.size for slab in message.leaving], self.group, "heads and sequence"
        )

        @contextmanager
        def arrived():
            transfer.wait()
            yield (
                []
                if received is into
                else [
                    (rank, slab.apart(flat))
                    for rank, (slab, flat) in enumerate(zip(message.arriving, received.split(sizes)))
                ]
            )

        return arrived

    def _start_on_host(self, message, others, turn):
        """``_start`` where all ranks share memory: pieces are packed into it, and read where the sender put them."""
        sends, receives = [], []
        for rank, peer in others:
            slab = message.leaving[rank]
            target = self._buffer(f"a2a.send{turn}.{rank}", (slab.size,), message.like)
            carried = self.host.carries(peer, target)
            parcel = self.host.place([peer], target.numel() * target.element_size()) if carried else None
            flat = target if parcel is None else parcel.view(target)
            fill(slab.apart(flat), message.pieces(rank))
            sends.append((peer, target if parcel is None else parcel))
            receives.append(
                (peer, self._buffer(f"a2a.receive{turn}.{rank}", (message.arriving[rank].size,), message.like))
            )
        transfer = post(self.group, sends, receives, "heads and sequence", self.host, count=False)

        @contextmanager
        def arrived():
            views = {**dict(receives), **dict(transfer.peek())}  # what is empty was not sent
            yield [(self.rank, message.pieces(self.rank))] + [
                (rank, message.arriving[rank].apart(views[peer])) for rank, peer in others
            ]
            transfer.release()

        return arrived

    @contextmanager
    def _gather_and_slice(self, message):
        """What the all-to-all would give, by gathering every rank's whole message and taking this rank's slices."""
        send, like = message.packed(), message.like
        sizes = torch.tensor([slab.size for slab in message.leaving], device=like.device)
        table = sizes.new_empty(self.size * self.size)
        all_gather(table, sizes, self.group, "sizes", count=False).wait()
        table = table.view(self.size, self.size)
        longest = int(table.sum(1).max())
        padded = self._buffer("gather.send", (longest,), like)
        padded[: send.numel()] = send
        gathered = self._buffer("gather.receive", (self.size, longest), like)
        all_gather(gathered.view(-1), padded, self.group, "gathered", self.host, count=False).wait()
        starts = (table.cumsum(1) - table)[:, self.rank].tolist()
        yield [
            (source, slab.apart(gathered[source, start : start + slab.size]))
            for source, (slab, start) in enumerate(zip(message.arriving, starts))
        ]

    def _rows(self, rank):
        """The tokens of ``rank``, a slice of the whole sequence."""
        start = sum(self.lengths[:rank])
        return slice(start, start + self.lengths[rank])

    def _buffer(self, name, shape, like):
        """Uninitialised memory: the workspace's of this name, fresh without one."""
        return like.new_empty(shape) if name is None else self.workspace.get(name, shape, like.dtype, like.device)

    def _unpacked(self, slab, name, like):
        """Tensors (rows, batch, heads, dim) of their own for what a slab holds, in the order in memory that ``unpack``
        says.
        """
        results = []
        for index, (count, dim) in enumerate(slab.heads):
            own = None if name is None else f"{name}.{index}"
            if self.unpack == "heads":
                results.append(self._buffer(own, (slab.batch, count, slab.rows, dim), like).permute(2, 0, 1, 3))
            else:
                results.append(self._buffer(own, (slab.rows, slab.batch, count, dim), like))
        return results

    def _record(self, parts, elements, like):
        """Count what leaves; elements: per part, those for each rank. The own share leaves only when gathered."""
        sent = {}
        for part, sizes in zip(parts, elements):
            leaving = sum(sizes) - sizes[self.rank] if self.alltoall else sum(sizes) * (self.size - 1)
            sent[part.purpose] = sent.get(part.purpose, 0) + leaving * like.element_size()
        record(sent)


def _pack_heads(tensors, dtype, workspace):
    """Heads of several tensors (seq, batch, heads, dim) side by side in ``dtype``, flat; one that fits is only
    viewed.
    """
    if len(tensors) == 1 and tensors[0].dtype == dtype:
        return tensors[0].contiguous().view(-1)
    slab = Slab(*tensors[0].shape[:2], tuple(tuple(tensor.shape[2:]) for tensor in tensors))
    packed = workspace.get("a2a.packed", (slab.size,), dtype, tensors[0].device)
    fill(slab.apart(packed), tensors)
    return packed


def _join_heads(part, pieces, like):
    """Put every rank's heads (seq, batch, heads_local, dim) back into one tensor of all heads, of ``like``'s dtype."""
    shape = (*pieces[0].shape[:2], part.num_heads, part.dim)
    if not part.replicated:
        joined = like.new_empty(shape)
        for share, piece in zip(part.shares, pieces):
            joined[:, :, share] = piece
        return joined
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    joined = like.new_zeros(shape, dtype=dtype)
    for share, piece in zip(part.shares, pieces):
        heads = torch.arange(part.num_heads, device=like.device)[share]
        joined.index_add_(2, heads, piece.to(like.dtype).to(dtype))  # rounded as on the wire, whoever computed it
    return joined.to(like.dtype)
