"""What travels at each step of an exchange, as a function of the plan; used to predict times."""

from collections.abc import Iterator

from mindspeed_cp.attention.exchange_choice import Exchange
from mindspeed_cp.attention.mesh_plan import mesh_plan
from mindspeed_cp.attention.ring_plan import RingPlan
from mindspeed_cp.comm.schedule import RingPlace


def rows_sent(plan: RingPlan, exchange: Exchange, place: RingPlace) -> Iterator[dict[int, int]]:
    """For each transfer of keys and values in one rank's forward pass, in the order of the steps that need them: ring
    rank -> number of rows sent there. Bytes are rows x batch x KV heads x (dk + dv) x element size; gradients return
    the same rows in the opposite direction.

    A ring forwards the shard of the previous step; transfers between windows count for the next window's first step.
    """
    rank, size = place.rank, len(plan.lengths)
    others = [other for other in range(size) if other != rank]
    if exchange == "allgather":
        yield dict.fromkeys(others, max(plan.lengths))
    elif exchange == "mesh":
        for step in mesh_plan(plan, rank).steps:
            rows = {peer: sum(stop - start for start, stop in step.leaving[peer]) for peer in others}
            yield {peer: count for peer, count in rows.items() if count}
    elif exchange == "direct":
        for distance in range(1, size):
            peer = (rank + distance) % size
            count = sum(stop - start for start, stop in plan.rows_needed(peer, rank))
            yield {peer: count} if count else {}
    else:
        steps = list(place.steps())
        for before, after in zip(steps, steps[1:]):
            crosses = after.place == 0
            leaving = steps[before.window * place.window] if crosses else before
            assert leaving.source is not None
            count = plan.lengths[leaving.source]
            yield {place.peer(1, 0) if crosses else place.peer(0, 1): count} if count else {}
