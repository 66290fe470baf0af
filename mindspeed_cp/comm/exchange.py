"""How keys and values reach a rank: forwarded around a (double) ring, sent directly, or gathered at once.

Each exchange is a generator over steps: it yields (source, rows), own rows first, and moves the data for later steps
around the yield, where the caller computes. Rows are (seq, batch, kv_heads, dim), packed key and value or either of
them.

With ``overlap`` a transfer is posted before the block that hides it and awaited after it; without, it is posted after
the block and awaited at once. In both cases the first local block starts before any wait.
"""

from dataclasses import dataclass

import torch

from mindspeed_cp.accumulate import add_in_place
from mindspeed_cp.comm.schedule import RingPlace
from mindspeed_cp.comm.transport import all_gather, post


@dataclass(frozen=True)
class RingChannel:
    """What every exchange needs to know of the ring.

    Args:
        groups: ContextParallelGroups.
        lengths: rows of every ring rank's shard.
        rows_needed: (query rank, source rank) -> ((start, stop), ...), the rows of the source's shard that are wanted.
        overlap: post transfers before the block that hides them.
    """

    groups: object
    lengths: tuple[int, ...]
    rows_needed: object
    overlap: bool

    @property
    def place(self):
        _, window, windows = self.groups.hierarchy
        return RingPlace(self.groups.ring_rank, window, windows)

    def global_rank(self, ring_rank):
        return self.groups.ring_global_ranks[ring_rank]

    def buffer(self, name, like, source, keep=False):
        """A buffer for the shard of ``source``: fresh when it is kept for the backward pass, else from the
        workspace.
        """
        shape = (self.lengths[source], *like.shape[1:])
        if keep:
            return like.new_empty(shape)
        return self.groups.workspace.get(name, shape, like.dtype, like.device)


def ring_exchange(channel, own, purpose, keep=False):
    """Forward whole shards around the (double) ring.

    A buffer is received into only after everything sent from it has left: two inner and two outer buffers take turns.
    The transfer to the next window starts with the inner ring, so that the whole inner ring hides it.
    """
    place, groups = channel.place, channel.groups

    def pass_on(rows, outer, inner, group, name, source):
        received = channel.buffer(f"{purpose}.{name}", own, source, keep)
        transfer = post(
            group,
            [(channel.global_rank(place.peer(outer, inner)), rows)],
            [(channel.global_rank(place.peer(-outer, -inner)), received)],
            purpose,
            groups.host,
        )
        return transfer, received

    def to_next_window(rows, j):
        return pass_on(rows, 1, 0, groups.outer_group, f"outer{j % 2}", place.peer(-j - 1, 0))

    def within_window(rows, j, t):
        return pass_on(rows, 0, 1, groups.ring_group, f"inner{t % 2}", place.peer(-j, -t - 1))

    head = own
    for j in range(place.windows):
        last_window = j + 1 == place.windows
        crossing = to_next_window(head, j) if channel.overlap and not last_window else None
        rows = head
        for t in range(place.window):
            last_step = t + 1 == place.window
            step = within_window(rows, j, t) if channel.overlap and not last_step else None
            yield place.peer(-j, -t), rows
            if not last_step:
                transfer, rows = step or within_window(rows, j, t)
                transfer.wait()
        if not last_window:
            transfer, head = crossing or to_next_window(head, j)
            transfer.wait()


def direct_exchange(channel, own, purpose, keep=False):
    """At step t every rank sends to rank r + t exactly the rows that its blocks need, from its own memory.

    Nothing is forwarded. Rows that nobody asked for are left undefined in the receive buffer. Transfers run one step
    ahead of the computation.
    """
    place, ring_size = channel.place, len(channel.lengths)

    def fetch(t):
        reader, source = (place.rank + t) % ring_size, (place.rank - t) % ring_size
        received = channel.buffer(f"{purpose}.direct{t % 2}", own, source, keep)
        transfer = post(
            channel.groups.ring_group,
            [(channel.global_rank(reader), own[start:stop]) for start, stop in channel.rows_needed(reader, place.rank)],
            [
                (channel.global_rank(source), received[start:stop])
                for start, stop in channel.rows_needed(place.rank, source)
            ],
            purpose,
            channel.groups.host,
        )
        return transfer, received

    rows = own
    for t in range(ring_size):
        ahead = fetch(t + 1) if channel.overlap and t + 1 < ring_size else None
        yield (place.rank - t) % ring_size, rows
        if t + 1 < ring_size:
            transfer, rows = ahead or fetch(t + 1)
            transfer.wait()


def allgather_exchange(channel, own, purpose, keep=False):
    """Gather every shard with one collective; uneven shards are padded to the longest."""
    groups, ring_size, longest = channel.groups, len(channel.lengths), max(channel.lengths)
    shape = (longest, *own.shape[1:])
    get = (
        own.new_empty if keep else lambda size: groups.workspace.get(f"{purpose}.gathered", size, own.dtype, own.device)
    )
    gathered = get((ring_size, *shape))
    padded = own
    if own.shape[0] < longest:
        padded = groups.workspace.get(f"{purpose}.padded", shape, own.dtype, own.device)
        padded[: own.shape[0]] = own

    def gather():
        return all_gather(gathered.flatten(0, 1), padded, groups.ring_group, purpose, groups.host)

    transfer = gather() if channel.overlap else None
    yield channel.place.rank, own
    (transfer or gather()).wait()
    for t in range(1, ring_size):
        source = (channel.place.rank - t) % ring_size
        yield source, gathered[source, : channel.lengths[source]]


EXCHANGES = {"ring": ring_exchange, "direct": direct_exchange, "allgather": allgather_exchange}


class GradientReturn:
    """Brings partial gradients of keys and values back to their owners, whatever brought the keys and values here.

    A partial goes straight to the rank of this window that held the shard first (inner step 0), which sums in the
    accumulation dtype; the window's sum crosses windows once, to the owner. Each partial is so rounded once to the wire
    dtype, and once more when it crosses windows. Without windows the first holder is the owner.

    Use: in window j, ``begin(j)`` gives the buffer of inner step 0 and ``wire(t, source)`` that of step t > 0, which
    ``send(j, t, source, partial)`` then takes; ``end(j)`` closes the window; ``finish`` returns the sum for the own
    rows.
    """

    def __init__(self, channel, own, like):
        """own: accumulator for this rank's rows, which step 0 fills; like: a tensor with the wire dtype."""
        self._channel, self._own, self._like = channel, own, like
        self._window_sum, self._inner, self._outer = own, None, None

    def begin(self, j):
        """The accumulator that the partial of inner step 0 of window j is to be written into."""
        if j > 0:
            source = self._channel.place.peer(-j, 0)
            shape = (self._channel.lengths[source], *self._own.shape[1:])
            self._window_sum = self._channel.groups.workspace.get(
                "dkv.window", shape, self._own.dtype, self._own.device
            )
        return self._window_sum

    def wire(self, t, source):
        """The buffer that the partial of inner step t > 0 is to be written into, in the wire dtype."""
        return self._channel.buffer(f"dkv.wire{t % 2}", self._like, source)

    def send(self, j, t, source, partial):
        """Send ``partial`` to the first holder of ``source`` and take the peer's partial for the shard held first
        here.
        """
        channel, place = self._channel, self._channel.place
        peer, held = place.peer(0, t), place.peer(-j, 0)
        rows_out, rows_in = channel.rows_needed(place.rank, source), channel.rows_needed(peer, held)
        received = channel.buffer(f"dkv.inner{t % 2}", self._like, held)
        transfer = post(
            channel.groups.ring_group,
            [(channel.global_rank(place.peer(0, -t)), partial[start:stop]) for start, stop in rows_out],
            [(channel.global_rank(peer), received[start:stop]) for start, stop in rows_in],
            "dkv",
            channel.groups.host,
        )
        self._drain_inner()
        self._inner = (transfer, received, rows_in, self._window_sum)

    def end(self, j):
        """Close window j: its sum goes to the owner, while the next window is computed."""
        channel, place = self._channel, self._channel.place
        self._drain_inner()
        self._drain_outer()
        if j == 0:
            return
        source, peer = place.peer(-j, 0), place.peer(j, 0)
        wire = channel.buffer("dkv.crossing", self._like, source)
        received = channel.buffer("dkv.outer", self._like, place.rank)
        sends, rows = [], ()
        if self._window_reads(place.rank, source):
            wire.copy_(self._window_sum)
            sends = [(channel.global_rank(source), wire)]
        if self._window_reads(peer, place.rank):
            rows = ((0, received.shape[0]),)
        transfer = post(
            channel.groups.outer_group,
            sends,
            [(channel.global_rank(peer), received)] if rows else [],
            "dkv",
            channel.groups.host,
        )
        self._outer = (transfer, received, rows, self._own)

    def _window_reads(self, member, source):
        """Whether any rank of ``member``'s window has a block against the shard of ``source``."""
        window = self._channel.place.window
        first = member // window * window
        return any(self._channel.rows_needed(reader, source) for reader in range(first, first + window))

    def finish(self):
        self._drain_inner()
        self._drain_outer()
        return self._own

    def _drain_inner(self):
        self._inner = self._add(self._inner)

    def _drain_outer(self):
        self._outer = self._add(self._outer)

    @staticmethod
    def _add(pending):
        if pending:
            transfer, received, rows, target = pending
            transfer.wait()
            for start, stop in rows:
                add_in_place(target[start:stop], received[start:stop])


def concatenated(stream, split):
    """Turn a stream of packed rows into a stream of (source, key, value); the key has ``split`` of the last
    dimension.
    """
    for source, rows in stream:
        yield source, rows[..., :split], rows[..., split:]


def paired(keys, values):
    """Turn two streams that run in step into one of (source, key, value)."""
    for (source, key), (_, value) in zip(keys, values, strict=True):
        yield source, key, value


def pack_rows(tensors):
    """Concatenate along the last dimension into one contiguous tensor: one copy."""
    return torch.cat(tensors, dim=-1)
