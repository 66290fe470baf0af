"""Every setting of context parallelism for one attention layer, timed on a model of the cluster."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from mindspeed_cp.arguments.declared import flags_of
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.trace import Compute, Event, Post, Problem, trace
from mindspeed_cp.sequence.masks import attention_masks
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.config import (
    KV_CACHE_POLICIES,
    ContextParallelConfig,
    KVCachePolicy,
    MaskType,
)
from mindspeed_cp.settings.training_setup import TrainingSetup, resolve

Policies = tuple[KVCachePolicy | None, ...]


@dataclass(frozen=True)
class Timing:
    """One pass of one rank, seconds; exposed is what computation waits for."""

    compute: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class Candidate:
    """One setting: both passes of the slowest traced rank, bytes as the largest that a traced rank sends.

    Args:
        intra_bytes, inter_bytes: to ranks of the own node and of others, forward and backward together.
    """

    config: ContextParallelConfig
    forward: Timing
    backward: Timing
    intra_bytes: int
    inter_bytes: int

    @property
    def compute(self) -> float:
        """Seconds of both passes in kernels."""
        return self.forward.compute + self.backward.compute

    @property
    def exposed(self) -> float:
        """Seconds of both passes that wait."""
        return self.forward.exposed + self.backward.exposed

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class Found:
    """Candidates, fastest first, and for every algorithm without one the first rule that excludes it."""

    candidates: tuple[Candidate, ...]
    excluded: dict[str, str]


def timeline(events: list[Event], cluster: Cluster, rank: int) -> Timing:
    """Play the events of one global rank. What is sent and what is received queue at each of its links, which are full
    duplex: transfers to several peers share the port of a switch or an adapter, and the links of a mesh carry them at
    once. Peers post when this rank posts.
    """
    now = compute = exposed = 0.0
    free: dict[tuple[bool, int, str], float] = {}
    ready = {}
    for event in events:
        if isinstance(event, Compute):
            seconds = cluster.attention_seconds(event.flops, event.tokens, event.head_dim)
            compute += seconds
            now += seconds
        elif isinstance(event, Post):
            ready[event.number] = now
            for way, ends in (("out", event.sent), ("in", event.received)):
                for (inter, number), size in _by_link(ends, cluster, rank).items():
                    start = max(now, free.get((inter, number, way), 0.0))
                    end = start + cluster.latency + size / cluster.bandwidth(inter)
                    free[inter, number, way] = end
                    ready[event.number] = max(ready[event.number], end)
        else:
            waited = max(ready[event.number] - now, 0.0)
            exposed += waited
            now += waited
    return Timing(compute, exposed)


def _by_link(ends: dict[int, int], cluster: Cluster, rank: int) -> dict[tuple[bool, int], int]:
    """Bytes on each link of ``rank``."""
    sizes: dict[tuple[bool, int], int] = {}
    for peer, size in ends.items():
        link = cluster.link(rank, peer)
        sizes[link] = sizes.get(link, 0) + size
    return sizes


def _apart(ends: dict[int, int], cluster: Cluster, rank: int) -> dict[bool, int]:
    """Bytes within (False) and between (True) nodes."""
    sizes = {False: 0, True: 0}
    for peer, size in ends.items():
        sizes[cluster.node(peer) != cluster.node(rank)] += size
    return sizes


def variants(cp: int, documents: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(algorithm, arguments of the configuration), whether or not they work together: the configuration says that.

    Args:
        documents: the balanced layout too, with the exchange that sends only what documents need.
    """
    divisors = [number for number in range(2, cp) if cp % number == 0]
    for name, row in ALGORITHMS.items():
        degrees: list[int | None] = [*divisors] if row.takes_degree and divisors else [None]
        for degree in degrees:
            windows = [number for number in divisors if number < cp // (degree or 1)] if row.takes_window else []
            for window in [1, *windows]:
                ways = [("auto", "ring"), ("auto", "direct"), ("balanced", "direct")][: 3 if documents else 2]
                for layout, exchange in ways if row.exchange == "ring" else ways[:1]:
                    for policy in KV_CACHE_POLICIES:
                        yield (
                            name,
                            dict(
                                context_parallel_size=cp,
                                algorithm=name,
                                ulysses_degree=degree,
                                window_size=window,
                                batch_layout=layout,
                                kv_exchange=exchange,
                                kv_cache_policy=policy,
                                send_recv_overlap=row.exchange is not None,
                            ),
                        )


def search(
    cp: int,
    problem: Problem,
    setup: TrainingSetup,
    cluster: Cluster,
    mask_type: MaskType = "causal",
    policies: Policies = KV_CACHE_POLICIES,
) -> Found:
    """Trace and time every setting that config.py's own rules allow, with these KV cache policies."""
    found: list[Candidate] = []
    first_rule: dict[str, str] = {}
    for name, arguments in variants(cp, problem.layout_documents is not None):
        if arguments["kv_cache_policy"] not in policies:
            continue
        try:
            config = ContextParallelConfig(**arguments, attention_mask_type=mask_type)
            resolve(config, setup)
            found.append(timed(config, problem, cluster))
        except ValueError as error:
            first_rule.setdefault(name, str(error))
    found.sort(key=_rank)
    working = {candidate.config.algorithm for candidate in found}
    return Found(tuple(found), {name: rule for name, rule in first_rule.items() if name not in working})


def _rank(candidate: Candidate) -> tuple[float, bool, int]:
    """By time; of equals the one without a policy, which holds less in a ring, then the one that sends less."""
    has_policy = candidate.config.kv_cache_policy is not None
    return float(f"{candidate.seconds:.9g}"), has_policy, candidate.intra_bytes + candidate.inter_bytes


def timed(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> Candidate:
    """One setting, traced; raises what the engine raises. Of a model with two kinds of layers it is the mean layer."""
    alike = replace(problem, is_pipeline=False)
    problem = alike if alike.layout(config) == problem.layout(config) else problem
    if problem.windowed is None:
        return _timed(config, problem, cluster)
    (window, share), whole = problem.windowed, replace(problem, windowed=None)
    wide, narrow = (_timed(config, each, cluster) for each in (whole, replace(whole, sliding_window=(window - 1, 0))))
    forward, backward = (
        Timing(*((1 - share) * one + share * other for one, other in zip(astuple(first), astuple(second))))
        for first, second in ((wide.forward, narrow.forward), (wide.backward, narrow.backward))
    )
    return replace(wide, forward=forward, backward=backward)


@lru_cache(maxsize=4096)
def _timed(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> Candidate:
    times, intra, inter = [], 0, 0
    for rank in traced_ranks(config, problem, cluster):
        passes = trace(config, problem, rank)
        place = rank * problem.stride
        times.append([timeline(each.events, cluster, place) for each in passes])
        sizes = [_apart(each.sent, cluster, place) for each in passes]
        intra, inter = max(intra, sum(s[False] for s in sizes)), max(inter, sum(s[True] for s in sizes))
    forward, backward = max(times, key=lambda passes: sum(each.seconds for each in passes))
    return Candidate(config, forward, backward, intra, inter)


def traced_ranks(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> list[int]:
    """All ranks of a small group; of a large one the first, the last, the last of the first node, and of documents
    and slices, which load ranks unevenly, those that compute the most and those that send or receive the most.
    """
    cp = config.context_parallel_size
    if cp <= 4:
        return list(range(cp))
    some = {0, min(max(cluster.devices_per_node // problem.stride, 1), cp) - 1, cp - 1}
    uneven = problem.cu_seqlens is not None or problem.attention_slices is not None
    return sorted(some | _busiest(config, problem, cluster) if uneven else some)


def _busiest(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> set[int]:
    """The rank with the largest attention area, and those whose rows travel furthest."""
    layout, degree, ranks = problem.layout(config), config.hierarchy[0], range(config.ring_size)
    given = problem.cu_seqlens, problem.sliding_window, problem.attention_slices
    masks = attention_masks(config.causal, problem.seq_len, problem.batch, *given)
    direct = config.kv_exchange == "direct"
    plan = ring_plan(layout, masks, True, exact=direct)
    found = {max(ranks, key=lambda rank: plan.area(rank, problem.batch))}
    if direct:
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


def hiding_tokens(problem: Problem, cluster: Cluster, inter: bool, causal: bool = True) -> float:
    """Local tokens from which a ring step's transfer hides behind its forward computation (docs/choosing.md)."""
    share = 0.5 if causal else 1.0
    ratio = problem.kv_heads * problem.dtype.itemsize / (2 * share * problem.heads)
    return cluster.attention_rate / cluster.bandwidth(inter) * ratio


def flags(config: ContextParallelConfig) -> str:
    """The flags to paste."""
    return f"{flags_of(config)} --use-flash-attn"
