"""How partial gradients of keys and values return to their owners, for every exchange of keys and values.

target(step)         the buffer for the partial of a step, and whether it is in the accumulation dtype
take(step, partial)  called when the partial is computed; sends it, unless it was summed in place
finish()             the sum for the own rows
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from mindspeed_cp.comm.channel import RingChannel, Rows, Tensors, parts
from mindspeed_cp.comm.link import OVERTAKING, Ends
from mindspeed_cp.comm.messages import Pending
from mindspeed_cp.comm.schedule import Step


class Partial(Protocol):
    """The gradients of one step's keys and values from this rank's blocks (``attention.merging.KVPartial``)."""

    def store(self) -> None:
        """Write the gradients of all rows into the targets."""

    def rows(self, ranges: Rows) -> list[torch.Tensor]:
        """These rows of the gradients of key and value."""

    def whole(self) -> Sequence[torch.Tensor]:
        """All rows of the gradients of key and value."""


class UnderWay:
    """Transfers in the order in which they were posted, at most ``most`` of which may be in flight."""

    def __init__(self, most: int) -> None:
        self._most, self._pending = most, deque[Pending[None]]()

    def add(self, pending: Pending[None]) -> None:
        self._pending.append(pending)
        self.drain(self._most)

    @property
    def num_left(self) -> int:
        return len(self._pending)

    def drain(self, left: int = 0) -> None:
        """Await the oldest transfers until ``left`` are left."""
        while len(self._pending) > left:
            self._pending.popleft().wait()


class GradientReturn:
    """A partial is sent directly to the rank of this window that held the shard first (inner step 0), which sums in the
    accumulation dtype; the window's sum crosses windows once, to the owner. So each partial is rounded to the wire
    dtype once, and a second time if it crosses windows. Without windows the first holder is the owner.
    """

    def __init__(self, channel: RingChannel, own: Tensors, like: Tensors) -> None:
        """own: accumulators for this rank's rows, filled by step 0; like: tensors with the wire dtype."""
        self._channel, self._own, self._like = channel, own, like
        self._window_sum = own
        self._ahead = channel.in_flight * channel.num_pieces
        self._taken = 0  # partials of this window, its first without
        self._inner, self._outer = UnderWay(self._ahead), UnderWay(1)
        self._expected: deque[Pending[None]] = deque()
        self._expect(0, 0)

    def target(self, step: Step) -> tuple[Tensors, bool]:
        channel, source = self._channel, step.source
        assert source is not None
        if step.place > 0 and self._taken == 0:
            self._inner.drain()  # the first block of this window has hidden the previous window's transfers
        if step.place > 0:
            name = f"dkv.wire{(self._taken + 1) % (self._ahead + 1)}"
            return channel.buffer(name, self._like, channel.rows_in(source, step.piece)), False
        if step.window > 0:
            self._window_sum = channel.buffer("dkv.window", self._own, channel.lengths[source])
            self._expect(step.window, 0)
        return self._window_sum, True

    def take(self, step: Step, partial: Partial) -> None:
        assert step.source is not None
        if step.place == 0:
            self._taken = 0
            partial.store()
        else:
            rows = partial.rows(self._channel.needed(self._channel.place.rank, step.source, step.piece))
            self._taken += 1
            self._send(step.window, step.place, rows)
        if self._taken == self._last:
            self._end(step.window)

    def _send(self, j: int, t: int, leaving: Sequence[torch.Tensor]) -> None:
        """Send a partial of window j to the first holder of its shard, and receive the peer's for the shard that this
        rank held first.
        """
        channel, place = self._channel, self._channel.place
        leaving_to, dtype = [(place.peer(0, -t), leaving)], self._like[0].dtype
        if self._expected:
            sent, received = channel.link.exchange(leaving_to, (), "dkv", dtype, OVERTAKING), self._expected.popleft()
            self._inner.add(sent.then(lambda _: received.wait()))
        else:
            self._inner.add(channel.link.exchange(leaving_to, self._arriving(j, self._taken), "dkv", dtype))
        self._expect(j, self._taken)

    @property
    def _last(self) -> int:
        """How many partials of a window are sent."""
        return len(self._channel.order_of_pieces)

    def _arriving(self, j: int, number: int) -> Ends:
        """What arrives with partial ``number`` (from 1) of window j: the rows that a peer needed of the shard that this
        rank held first, or of one piece of it."""
        place, (t, piece) = self._channel.place, self._channel.order_of_pieces[number - 1]
        peer, held = place.peer(0, t), place.peer(-j, 0)
        start, stop = self._channel.pieces[held][piece]
        rows = [total[start:stop] for total in self._window_sum]
        return [(peer, parts(rows, self._channel.needed(peer, held, piece)))]

    def _expect(self, j: int, number: int) -> None:
        """If several steps may be in flight, post the receives of the partials after ``number`` early: as many as may
        be in flight, and one more."""
        channel = self._channel
        if channel.in_flight == 1:
            return
        awaited = number - self._inner.num_left
        for following in range(number + len(self._expected) + 1, min(awaited + self._ahead + 1, self._last) + 1):
            expected = channel.link.expect(self._arriving(j, following), "dkv", self._like[0].dtype)
            if expected is None:
                return
            self._expected.append(expected)

    def _end(self, j: int) -> None:
        """End window j: its sum is sent to the owner while the next window is computed."""
        channel, place = self._channel, self._channel.place
        if j == 0:
            return  # its sum is for this rank's own rows, so nothing is sent
        self._inner.drain()
        self._outer.drain()
        source, peer = place.peer(-j, 0), place.peer(j, 0)
        leaving: Tensors = ()
        if self._window_reads(place.rank, source):
            leaving = channel.buffer("dkv.crossing", self._like, channel.lengths[source])
            for wire, total in zip(leaving, self._window_sum):
                wire.copy_(total)
        arriving = self._own if self._window_reads(peer, place.rank) else ()
        self._outer.add(channel.outer.exchange([(source, leaving)], [(peer, arriving)], "dkv", self._like[0].dtype))

    def _window_reads(self, member: int, source: int) -> bool:
        """Whether any rank of ``member``'s window has a block against the shard of ``source``."""
        window = self._channel.place.window
        first = member // window * window
        return any(self._channel.rows_needed(reader, source) for reader in range(first, first + window))

    def finish(self) -> Tensors:
        self._inner.drain()
        self._outer.drain()
        return self._own
