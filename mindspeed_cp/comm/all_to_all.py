"""All-to-all that trades a split of the sequence for a split of the heads, and back.

Sequence-first tensors make one side of each exchange a plain slice::

    heads -> sequence   (seq_local, batch, heads, dim), all heads    -> (seq, batch, heads_local, dim)   one copy before
    sequence -> heads   (seq, batch, heads_local, dim)               -> (seq_local, batch, heads, dim)   one copy after

Several tensors travel in one message: each rank gets, for every token, its heads of all of them side by side, and the
results are views into that row.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch

from mindspeed_cp.comm.counters import record
from mindspeed_cp.comm.transport import all_gather, all_to_all


@dataclass(frozen=True)
class Part:
    """One tensor of a message.

    Args:
        purpose: what its bytes count as.
        num_heads, dim: heads of the whole tensor, and their size.
        shares: per rank, the heads that it gets: a slice, or a list of indices. A head may go to several ranks.
    """

    purpose: str
    num_heads: int
    dim: int
    shares: tuple

    def count(self, rank):
        share = self.shares[rank]
        return share.stop - share.start if isinstance(share, slice) else len(share)

    def width(self, rank):
        return self.count(rank) * self.dim

    @property
    def replicated(self):
        return sum(map(self.count, range(len(self.shares)))) > self.num_heads


@dataclass(frozen=True, eq=False)
class SequenceExchange:
    """The all-to-all of one Ulysses group for a given sequence.

    Args:
        group: process group; rank: this rank in it.
        lengths: tokens of every rank before the exchange, in rank order; any lengths, zero included.
        workspace: reused send and receive buffers.
        alltoall: False replaces the all-to-all by an all-gather of everything and slicing (same numbers, more bytes).
    """

    group: object
    rank: int
    lengths: tuple[int, ...]
    workspace: object
    alltoall: bool = True

    @property
    def size(self):
        return len(self.lengths)

    def scatter_heads_gather_sequence(self, parts, tensors, name=None):
        """Give every rank its heads of the whole sequence.

        Args:
            parts, tensors: Part and (seq_local, batch, heads, dim) of each tensor of the message.
            name: workspace name of the received buffer, None for a fresh one that may be saved.

        Returns:
            list of (seq, batch, heads_local, dim), views into one received buffer.
        """
        like, total = tensors[0], sum(self.lengths)
        rows, batch = like.shape[:2]
        widths = [sum(part.width(rank) for part in parts) for rank in range(self.size)]
        sizes = [rows * batch * width for width in widths]
        send = self.workspace.get("a2a.send", (sum(sizes),), like.dtype, like.device)
        for rank, piece in enumerate(send.split(sizes)):
            _pack(piece.view(rows, batch, widths[rank]), parts, tensors, rank)
        shape = (total, batch, widths[self.rank])
        received = like.new_empty(shape) if name is None else self.workspace.get(name, shape, like.dtype, like.device)
        self._exchange(received.view(-1), send, [length * batch * shape[2] for length in self.lengths], sizes)
        self._record([(part.purpose, [rows * batch * part.width(rank) for rank in range(self.size)]) for part in parts], like)
        stops = list(accumulate(part.width(self.rank) for part in parts))
        return [received[..., stop - part.width(self.rank):stop].unflatten(-1, (part.count(self.rank), part.dim))
                for stop, part in zip(stops, parts)]

    def scatter_sequence_gather_heads(self, parts, packed):
        """Give every rank its tokens of all heads: the inverse, and the gradient, of the other direction.

        Args:
            parts: Part of each tensor of the message.
            packed: (seq, batch, width) contiguous, this rank's heads of every part side by side.

        Returns:
            list of fresh (seq_local, batch, heads, dim). A head that several ranks hold is summed in float32 (float64 for
            float64).
        """
        rows, batch = self.lengths[self.rank], packed.shape[1]
        widths = [sum(part.width(rank) for part in parts) for rank in range(self.size)]
        sizes = [rows * batch * width for width in widths]
        received = self.workspace.get("a2a.receive", (sum(sizes),), packed.dtype, packed.device)
        self._exchange(received, packed.view(-1), sizes, [length * batch * packed.shape[2] for length in self.lengths])
        self._record([(part.purpose, [length * batch * part.width(self.rank) for length in self.lengths])
                      for part in parts], packed)
        pieces = [piece.view(rows, batch, width) for piece, width in zip(received.split(sizes), widths)]
        starts, tensors = [0] * self.size, []
        for part in parts:
            cut = [piece[..., start:start + part.width(rank)].unflatten(-1, (part.count(rank), part.dim))
                   for rank, (piece, start) in enumerate(zip(pieces, starts))]
            tensors.append(_join_heads(part, cut))
            starts = [start + part.width(rank) for rank, start in enumerate(starts)]
        return tensors

    def gather_sequence(self, purpose, tensor):
        """All-gather (seq_local, batch, heads, dim) along the sequence into a fresh tensor; uneven lengths are padded."""
        longest, tail = max(self.lengths), tensor.shape[1:]
        padded = self.workspace.get("gather.send", (longest, *tail), tensor.dtype, tensor.device)
        padded[:tensor.shape[0]] = tensor
        gathered = tensor.new_empty((self.size * longest, *tail))
        all_gather(gathered, padded, self.group, purpose).wait()
        if min(self.lengths) == longest:
            return gathered
        return torch.cat([shard[:length] for shard, length in zip(gathered.split(longest), self.lengths)])

    def _exchange(self, received, send, receive_sizes, send_sizes):
        if self.alltoall:
            all_to_all(received, send, receive_sizes, send_sizes, self.group, "heads and sequence").wait()
        else:
            self._gather_and_slice(received, send, receive_sizes, send_sizes)

    def _gather_and_slice(self, received, send, receive_sizes, send_sizes):
        """What the all-to-all would give, by gathering every rank's send buffer and taking this rank's slices."""
        sizes = torch.tensor(send_sizes, device=send.device)
        table = sizes.new_empty(self.size * self.size)
        all_gather(table, sizes, self.group, "sizes", count=False).wait()
        table = table.view(self.size, self.size)
        longest = int(table.sum(1).max())
        padded = self.workspace.get("gather.send", (longest,), send.dtype, send.device)
        padded[:send.numel()] = send
        gathered = self.workspace.get("gather.receive", (self.size, longest), send.dtype, send.device)
        all_gather(gathered.view(-1), padded, self.group, "gathered", count=False).wait()
        starts = (table.cumsum(1) - table)[:, self.rank].tolist()
        for source, piece in enumerate(received.split(receive_sizes)):
            piece.copy_(gathered[source, starts[source]:starts[source] + receive_sizes[source]])

    def _record(self, elements, like):
        """elements: (purpose, elements of the send buffer for each rank); the own share leaves only when gathered."""
        sent = {}
        for purpose, sizes in elements:
            leaving = sum(sizes) - sizes[self.rank] if self.alltoall else sum(sizes) * (self.size - 1)
            sent[purpose] = sent.get(purpose, 0) + leaving * like.element_size()
        record(sent)


def _pack(target, parts, tensors, rank):
    """Write the heads of ``rank`` of every tensor side by side into target (seq, batch, width)."""
    start = 0
    for part, tensor in zip(parts, tensors):
        stop = start + part.width(rank)
        target[..., start:stop].unflatten(-1, (part.count(rank), part.dim)).copy_(tensor[:, :, part.shares[rank]])
        start = stop


def pack_heads(tensors, dtype, workspace):
    """Heads of several tensors side by side: (seq, batch, heads, dim) each -> (seq, batch, sum of heads * dim), in ``dtype``.

    A single contiguous tensor of that dtype is returned as a view, everything else lies in ``workspace``.
    """
    if len(tensors) == 1 and tensors[0].dtype == dtype:
        return tensors[0].contiguous().flatten(2)
    widths = [tensor.shape[2] * tensor.shape[3] for tensor in tensors]
    packed = workspace.get("a2a.packed", (*tensors[0].shape[:2], sum(widths)), dtype, tensors[0].device)
    for piece, tensor in zip(packed.split(widths, dim=-1), tensors):
        piece.unflatten(-1, tensor.shape[2:]).copy_(tensor)
    return packed


def _join_heads(part, pieces):
    """Put every rank's heads (seq, batch, heads_local, dim) back into one tensor of all heads."""
    like = pieces[0]
    shape = (*like.shape[:2], part.num_heads, part.dim)
    if not part.replicated:
        joined = like.new_empty(shape)
        for share, piece in zip(part.shares, pieces):
            joined[:, :, share] = piece
        return joined
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    joined = like.new_zeros(shape, dtype=dtype)
    for share, piece in zip(part.shares, pieces):
        heads = torch.arange(part.num_heads, device=like.device)[share]
        joined.index_add_(2, heads, piece.to(dtype))
    return joined.to(like.dtype)
