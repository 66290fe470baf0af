"""The mesh exchange: in each step all ranks exchange one slice of every shard, so that all links are used at once.

Each reader's part of a shard, the rows that its blocks need, is cut into as many slices as there are other ranks. A
step brings one slice from each rank by one all-to-all, with a ring's memory: one buffer for computation and one per
step in flight. The rows of a step are sorted by position, whichever rank sent them, so that its blocks are as large as
those against one shard. Gradients return by the reverse exchange and are summed in the accumulation dtype.
"""

from collections.abc import Sequence

import torch

from mindspeed_cp.comm.channel import RingChannel, Rows, Stream, Tensors, UnderWay, parts, run_ahead
from mindspeed_cp.comm.gradient_return import Partial
from mindspeed_cp.comm.gradient_return import UnderWay as Transfers
from mindspeed_cp.comm.messages import Message, Pending
from mindspeed_cp.comm.meter import record
from mindspeed_cp.comm.schedule import Step
from mindspeed_cp.kernels.base import MemoryOrder


def mesh_exchange(channel: RingChannel, own: Tensors, purpose: str, keep: bool = False) -> Stream:
    """Yield the own shard, then the rows of each step, with up to ``in_flight`` steps in flight.

    Steps in flight are received into separate memory; one buffer holds the rows for computation.
    """

    def bring(t: int) -> UnderWay:
        step = channel.mesh[t - 1]
        received = channel.buffer(f"{purpose}.mesh", own, step.num_rows, keep, channel.order)
        leaving = _messages(own, step.leaving, own[0].dtype, channel.order)
        arriving = _messages(received, step.arriving, own[0].dtype, channel.order, apart=not keep)
        return _trade(channel, leaving, arriving, purpose), received

    return run_ahead(channel, len(channel.mesh) + 1, own, lambda steps, _: [bring(t) for t in steps])


class MeshReturn:
    """Sends the partial gradients of a step back to the ranks from which its rows came, all at once."""

    def __init__(self, channel: RingChannel, own: Tensors, like: Tensors) -> None:
        """own: accumulators for this rank's rows, filled by step 0; like: tensors with the wire dtype."""
        self._channel, self._own, self._like = channel, own, like
        self._transfers = Transfers(channel.in_flight)

    def target(self, step: Step) -> tuple[Tensors, bool]:
        if step.place == 0:
            return self._own, True
        return self._channel.buffer("dkv.mesh", self._own, self._channel.mesh[step.place - 1].num_rows), True

    def take(self, step: Step, partial: Partial) -> None:
        if step.place == 0:
            partial.store()
            return
        mesh, dtype = self._channel.mesh[step.place - 1], self._like[0].dtype
        leaving = _messages(partial.whole(), mesh.arriving, dtype, apart=True)
        arriving = _messages(self._own, mesh.leaving, dtype, adds=True)
        self._transfers.add(_trade(self._channel, leaving, arriving, "dkv"))

    def finish(self) -> Tensors:
        self._transfers.drain()
        return self._own


def _messages(
    rows: Sequence[torch.Tensor],
    ranges: tuple[Rows, ...],
    dtype: torch.dtype,
    order: MemoryOrder | None = None,
    adds: bool = False,
    apart: bool = False,
) -> list[Message]:
    """One message per rank, of that rank's rows."""
    nothing = rows[0].new_empty(0)
    return [
        Message(tuple((part,) for part in parts(rows, of_rank, order)) or ((nothing,),), dtype, adds, apart)
        for of_rank in ranges
    ]


def _trade(channel: RingChannel, leaving: list[Message], arriving: list[Message], purpose: str) -> Pending[None]:
    num_bytes = sum(message.num_bytes for message in leaving)
    if num_bytes:
        record({purpose.partition(".")[0]: num_bytes})
    return channel.link.all_to_all(leaving, arriving, purpose, by_messages=True)
