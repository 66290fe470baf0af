"""How keys and values reach a rank: forwarded around a (double) ring, sent directly, in slices of all shards at once
(the mesh exchange), or gathered.

Each exchange is a generator over steps, own rows first. It transfers data for later steps before and after each yield,
while the caller computes. Rows are a tuple of tensors (seq, batch, kv_heads, dim), key and value or one of them. They
travel in one message, all rows of the key before those of the value, in the kernel's memory order, so that only the
owner has to copy them, once.

With ``overlap`` a transfer is posted before the block that hides it and awaited after it; without, it is posted after
the block and awaited immediately. In both cases the first local block starts before any wait.
"""

from collections.abc import Sequence

import torch

from mindspeed_cp.comm.channel import RingChannel, Stream, Tensors, UnderWay, parts, run_ahead
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.mesh_exchange import mesh_exchange
from mindspeed_cp.comm.messages import Pending, as_stored, end_to_end, flat_memory
from mindspeed_cp.comm.reading_in_place import can_read_in_place, of_direct, of_gather, of_ring, read_in_place


def ring_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """Move whole shards around the (double) ring.

    A buffer is received into only after everything sent from it is done: two inner and two outer buffers alternate. The
    transfer to the next window starts with the inner ring, so that the whole inner ring hides it. With one step in
    flight, shards are forwarded from neighbour to neighbour; with several, the window's first holder sends them to all.
    """
    if not keep and can_read_in_place(channel, own):
        return read_in_place(channel, own, purpose, list(of_ring(channel)), channel.link.peers)
    return _forwarded(channel, own, purpose, keep)


def _forwarded(channel: RingChannel, own: Tensors, purpose: str, keep: bool) -> Stream:
    place = channel.place

    def pass_on(link: Link, steps: Sequence[tuple[Tensors, int, str, int, int]]) -> list[UnderWay]:
        """steps: (rows to send, target rank, name of the receive buffer, owner of the received shard, source rank)."""
        exchanges, received = [], []
        for leaving, to, name, source, origin in steps:
            received.append(channel.buffer(f"{purpose}.{name}", own, channel.lengths[source], keep, channel.order))
            sent, arriving = ([as_stored(rows, channel.order) for rows in shard] for shard in (leaving, received[-1]))
            exchanges.append(([(to, sent)], [(origin, arriving)]))
        return list(zip(link.exchange_several(exchanges, purpose), received))

    def to_next_window(rows: Tensors, j: int) -> UnderWay:
        peers = place.peer(1, 0), place.peer(-1, 0)
        return pass_on(channel.outer, [(rows, peers[0], f"outer{j % 2}", place.peer(-j - 1, 0), peers[1])])[0]

    def within_window(head: Tensors, j: int) -> Stream:
        def fetch(steps: range, rows: Tensors) -> list[UnderWay]:
            found = []
            for t in steps:
                leaving, distance = (rows, 1) if channel.in_flight == 1 else (head, t)
                peers = place.peer(0, distance), place.peer(0, -distance)
                # One buffer is used for computation while ``in_flight`` others are received into.
                name = f"inner{(t - 1) % (channel.in_flight + 1)}"
                found.append((leaving, peers[0], name, place.peer(-j, -t), peers[1]))
            return pass_on(channel.link, found)

        return run_ahead(channel, place.window, head, fetch)

    head = own
    for j in range(place.windows):
        last_window = j + 1 == place.windows
        crossing = to_next_window(head, j) if channel.overlap and not last_window else None
        yield from within_window(head, j)
        if not last_window:
            pending, head = crossing or to_next_window(head, j)
            pending.wait()


def direct_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """At step t every rank sends to rank r + t exactly the rows that its blocks need, from its own memory.

    Nothing is forwarded. Rows that are not needed are undefined in the receive buffer. Transfers run up to
    ``in_flight`` steps ahead of the computation. If shards are split into pieces, each piece is a transfer of its own.
    """
    rank, ring_size = channel.place.rank, len(channel.lengths)
    if not keep and can_read_in_place(channel, own):
        readers = [reader for reader in channel.link.peers if channel.rows_needed(reader, rank)]
        return read_in_place(channel, own, purpose, list(of_direct(channel)), readers)
    own_pieces = [tuple(rows[start:stop] for rows in own) for start, stop in channel.pieces[rank]]

    def fetch(numbers: range, _: Tensors) -> list[UnderWay]:
        exchanges, received = [], []
        for number in numbers:
            t, piece = channel.order_of_pieces[number - 1]
            reader, source = (rank + t) % ring_size, (rank - t) % ring_size
            # The transfers that are alive together are the one being computed with and those in flight.
            name = f"{purpose}.direct{number % (channel.in_flight * channel.num_pieces + 1)}"
            received.append(channel.buffer(name, own, channel.rows_in(source, piece), keep, channel.order))
            leaving = parts(own_pieces[piece], channel.needed(reader, rank, piece), channel.order)
            arriving = parts(received[-1], channel.needed(rank, source, piece), channel.order)
            exchanges.append(([(reader, leaving)], [(source, arriving)]))
        return list(zip(channel.link.exchange_several(exchanges, purpose), received))

    return run_ahead(channel, len(channel.order_of_pieces) + 1, own, fetch, channel.num_pieces)


def allgather_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """Gather all shards with one collective."""
    if not keep and can_read_in_place(channel, own):
        return read_in_place(channel, own, purpose, list(of_gather(channel)), channel.link.peers)
    return _gathered(channel, own, purpose, keep)


def _gathered(channel: RingChannel, own: Tensors, purpose: str, keep: bool) -> Stream:
    rank, ring_size = channel.place.rank, len(channel.lengths)
    widths = [tensor.shape[1:] for tensor in own]
    sizes = [rows * sum(width.numel() for width in widths) for rows in channel.lengths]

    def gather() -> Pending[list[torch.Tensor]]:
        flat = flat_memory([as_stored(tensor, channel.order) for tensor in own])
        assert flat is not None, "own rows are packed"
        return channel.link.gather(flat, sizes, purpose, None if keep else f"{purpose}.gathered")

    pending = gather() if channel.overlap else None
    yield own
    shards = (pending or gather()).wait()
    for t in range(1, ring_size):
        source = (rank - t) % ring_size
        shapes = [(channel.lengths[source], *width) for width in widths]
        yield end_to_end(shards[source], shapes, channel.order)


EXCHANGES = {
    "ring": ring_exchange,
    "direct": direct_exchange,
    "mesh": mesh_exchange,
    "allgather": allgather_exchange,
}
