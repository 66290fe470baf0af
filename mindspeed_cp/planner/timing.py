"""Seconds of one setting of context parallelism in one attention layer: the engine's events, simulated on a cluster."""

from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import numpy as np

from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.events import Compute, Event, Post, Product, Wait
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.sequence.masks import attention_masks
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.fields import LinearExchange

WAITING = 0.01  # fraction of its time that a setting must wait before variants that hide more are tried


@dataclass(frozen=True)
class Timing:
    """Seconds of one pass of one rank.

    Args:
        exposed: seconds for which computation waits. heads: the part of it that waits for Ulysses' exchange.
    """

    compute: float
    exposed: float
    heads: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class Candidate:
    """One setting: both passes of the slowest traced rank, and the most bytes that a traced rank sends.

    Args:
        intra_bytes, inter_bytes: to ranks of the same node and of other nodes, forward and backward together.
    """

    config: ContextParallelConfig
    forward: Timing
    backward: Timing
    intra_bytes: int
    inter_bytes: int

    @property
    def compute(self) -> float:
        """Kernel seconds of both passes."""
        return self.forward.compute + self.backward.compute

    @property
    def exposed(self) -> float:
        """Seconds for which computation waits in both passes."""
        return self.forward.exposed + self.backward.exposed

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def waits_for_heads(self) -> bool:
        """Whether exchanging in groups of heads could hide more of Ulysses' exchange."""
        return self.forward.heads + self.backward.heads > WAITING * self.seconds

    @property
    def waits_for_rows(self) -> bool:
        """Whether another exchange of keys and values could hide more."""
        return self.exposed - self.forward.heads - self.backward.heads > WAITING * self.seconds


def timeline(events: list[Event], cluster: Cluster, rank: int) -> Timing:
    """Simulate the events of one global rank. Transfers queue at each of its links, separately per direction (full
    duplex): transfers to several peers share the port of a switch or an adapter, and use the links of a mesh at once.
    Peers are assumed to post when this rank posts.
    """
    now = compute = exposed = heads = 0.0
    of_heads: set[int] = set()
    free: dict[tuple[bool, int, str], float] = {}
    ready = {}
    for event in events:
        if isinstance(event, (Compute, Product)):
            seconds = event.seconds(cluster)
            compute += seconds
            now += seconds
        elif isinstance(event, Post):
            ready[event.number] = now
            of_heads |= {event.number} if event.of_heads else set()
            for way, ends in (("out", event.sent), ("in", event.received)):
                for (inter, number), size in _by_link(ends, cluster, rank).items():
                    start = max(now, free.get((inter, number, way), 0.0))
                    end = start + cluster.latency + size / cluster.bandwidth(inter)
                    free[inter, number, way] = end
                    ready[event.number] = max(ready[event.number], end)
        else:
            waited = max(ready[event.number] - now, 0.0)
            exposed += waited
            heads += waited if event.number in of_heads else 0.0
            now += waited
    return Timing(compute, exposed, heads)


def _by_link(ends: dict[int, int], cluster: Cluster, rank: int) -> dict[tuple[bool, int], int]:
    """Bytes on each link of ``rank``."""
    sizes: dict[tuple[bool, int], int] = {}
    for peer, size in ends.items():
        link = cluster.link(rank, peer)
        sizes[link] = sizes.get(link, 0) + size
    return sizes


def timed(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> Candidate:
    """Trace and time one setting; raises the engine's errors. For a model with several kinds of layers, the result is
    their mean, and the setting includes the fastest exchange for layers with a state.
    """
    alike = replace(problem, is_pipeline=False)
    problem = alike if alike.layout(config) == problem.layout(config) else problem
    whole = replace(problem, windowed=None, linear=None)
    if problem.windowed is None:
        found = _timed(config, whole, cluster)
    else:
        window, share = problem.windowed
        found = _timed(config, replace(whole, sliding_window=(window - 1, 0)), cluster)
        if share < 1:
            found = _mean(_timed(config, whole, cluster), found, share)
    if problem.linear is None:
        return found
    layer, share = problem.linear
    other = _with_state(config, replace(whole, layer=layer, latent=None), cluster)
    sent = [(found.intra_bytes, other.intra_bytes), (found.inter_bytes, other.inter_bytes)]
    intra, inter = (round((1 - share) * one + share * more) for one, more in sent)
    return replace(_mean(found, other, share), config=other.config, intra_bytes=intra, inter_bytes=inter)


def _mean(first: Candidate, second: Candidate, share: float) -> Candidate:
    """Return ``first`` with the mean times of layers, a fraction ``share`` of which take the times of ``second``."""
    forward, backward = (
        Timing(*((1 - share) * one + share * other for one, other in zip(astuple(this), astuple(that))))
        for this, that in ((first.forward, second.forward), (first.backward, second.backward))
    )
    return replace(first, forward=forward, backward=backward)


def _with_state(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> Candidate:
    """Time a layer with a state, using the faster of heads and state; state if there are fewer heads than ranks."""
    ways: tuple[LinearExchange, ...] = ("heads", "state") if config.context_parallel_size > 1 else ("heads",)
    found = []
    for way in ways:
        with suppress(ValueError):
            found.append(_timed(replace(config, linear_exchange=way), problem, cluster))
    return min(found, key=lambda candidate: candidate.seconds)


@lru_cache(maxsize=4096)
def _timed(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> Candidate:
    times, intra, inter = [], 0, 0
    for rank in traced_ranks(config, problem, cluster):
        passes = trace(config, problem, rank)
        place = rank * problem.stride
        times.append([timeline(each.events, cluster, place) for each in passes])
        links = [_by_link(each.sent, cluster, place) for each in passes]
        within, between = (
            sum(size for each in links for (leaves, _), size in each.items() if leaves is is_inter)
            for is_inter in (False, True)
        )
        intra, inter = max(intra, within), max(inter, between)
    forward, backward = max(times, key=lambda passes: sum(each.seconds for each in passes))
    return Candidate(config, forward, backward, intra, inter)


def traced_ranks(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> list[int]:
    """Return all ranks of a small group. For a large group: the first, the last, the last of the first node; with
    documents or slices, which load ranks unevenly, also those that compute, send or receive the most.
    """
    cp = config.context_parallel_size
    if cp <= 4:
        return list(range(cp))
    some = {0, min(max(cluster.devices_per_node // problem.stride, 1), cp) - 1, cp - 1}
    uneven = problem.cu_seqlens is not None or problem.attention_slices is not None
    return sorted(some | _busiest(config, problem, cluster) if uneven else some)


def _busiest(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> set[int]:
    """Return the rank with the largest attention area, and the ranks of which most rows are sent: as keys and values in
    the direct exchange, and as returned gradients in every exchange.
    """
    layout, degree, ranks = problem.layout(config), config.hierarchy[0], range(config.ring_size)
    given = problem.cu_seqlens, problem.sliding_window, problem.attention_slices
    masks = attention_masks(config.causal, problem.seq_len, problem.batch, *given)
    plan = ring_plan(layout, masks, True, exact=True)
    found = {max(ranks, key=lambda rank: plan.area(rank, problem.batch))}
    nodes = np.array([cluster.node(rank * degree * problem.stride) for rank in ranks])
    rows = np.array(
        [
            [sum(stop - start for start, stop in plan.rows_needed(to, of)) if to != of else 0 for of in ranks]
            for to in ranks
        ]
    )
    for moved in (rows, rows * (nodes[:, None] != nodes)):
        found |= {int(moved.sum(0).argmax()), int(moved.sum(1).argmax())}
    return {rank * degree for rank in found}


def heads_seconds(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> float:
    """Least seconds that a pass waits for Ulysses' exchange: before the first group of heads and after the last."""
    degree = config.hierarchy[0]
    if degree == 1:
        return 0.0
    heads, local = -(-problem.heads // degree), problem.seq_len // config.context_parallel_size * problem.batch
    kv_heads = 0 if problem.latent else problem.kv_heads / degree
    arriving = heads * problem.dk + kv_heads * (problem.dk + problem.dv)
    seconds = 0.0
    for elements in (arriving, heads * problem.dv):
        size = int(local * elements * problem.dtype.itemsize // config.ulysses_chunks)
        peers = {peer * problem.stride: size for peer in range(1, degree)}
        seconds += timeline([Post(0, peers, peers), Wait(0)], cluster, 0).exposed
    return seconds * (1 - problem.linear[1]) if problem.linear else seconds


def preference(candidate: Candidate) -> tuple[float, bool, int, int]:
    """Sort key: time; then no KV cache policy, which saves memory in a ring; then the fewest steps in flight and
    groups of heads; then the fewest bytes.
    """
    config = candidate.config
    has_policy = config.kv_cache_policy is not None
    assert isinstance(config.in_flight, int)
    extra = config.in_flight + config.ulysses_chunks
    return float(f"{candidate.seconds:.9g}"), has_policy, extra, candidate.intra_bytes + candidate.inter_bytes
