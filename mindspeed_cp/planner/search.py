"""Times every setting of context parallelism for one attention layer on a model of the cluster."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np

from mindspeed_cp.arguments.declared import flags_of
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.events import Compute, Event, Post, Product
from mindspeed_cp.planner.mean_layer import mean_layer
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.sequence.masks import attention_masks
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.derived import KV_CACHE_POLICIES, KVCachePolicy, MaskType
from mindspeed_cp.settings.training_setup import TrainingSetup, resolve

Policies = tuple[KVCachePolicy | None, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds of one pass of one rank; ``exposed`` is what computation waits for."""

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
        """Seconds that kernels take in both passes."""
        return self.forward.compute + self.backward.compute

    @property
    def exposed(self) -> float:
        """Seconds for which computation waits in both passes."""
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
        elif isinstance(event, Product):
            seconds = cluster.product_seconds(event.flops, event.rows, event.columns)
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


# Layout, exchange and steps under way; only where a device reaches several peers at once do the last ones gain time.
WAYS = (("auto", "ring", 1), ("auto", "direct", 1))
OF_DOCUMENTS = (("balanced", "direct", 1),)
OF_A_MESH = (("auto", "direct", 2), ("auto", "mesh", 1), ("auto", "mesh", 2))
CHUNKS = (1, 2, 4)
SPARSE = "sparse attention gathers its keys from all ranks, whatever the algorithm is"
WAITING = 0.01  # part of its time that a setting waits, from which on what hides more of it is looked at


def policies_beside(chunks: int) -> Policies:
    """KV cache policies that are tried with so many groups of heads: groups save memory themselves, and with every
    policy they would crowd out settings that differ more.
    """
    return KV_CACHE_POLICIES if chunks == 1 else (None,)


def variants(
    cp: int, documents: bool = False, mesh: bool = False, latents: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(algorithm, arguments of the configuration), whether or not they work together: the configuration says that.

    Args:
        documents: the balanced layout too, with the exchange that sends only what documents need.
        mesh: the exchanges too that use several links at once.
        latents: of multi-latent attention both that may travel.
    """
    ring_ways = WAYS + OF_DOCUMENTS * documents + OF_A_MESH * mesh
    divisors = [number for number in range(2, cp) if cp % number == 0]
    for name, row in ALGORITHMS.items():
        degrees: list[int | None] = [*divisors] if row.takes_degree and divisors else [None]
        for degree in degrees:
            windows = [number for number in divisors if number < cp // (degree or 1)] if row.takes_window else []
            for window in [1, *windows]:
                ways = product(
                    ring_ways if row.exchange == "ring" else WAYS[:1],
                    CHUNKS if row.splits_heads else CHUNKS[:1],
                    ("latent", "heads") if latents and cp > 1 else ("auto",),
                    KV_CACHE_POLICIES,
                )
                for (layout, exchange, in_flight), chunks, form, policy in ways:
                    is_more = (layout, exchange, in_flight) in OF_A_MESH
                    if policy not in policies_beside(chunks) or (is_more and chunks > 1):
                        continue
                    arguments = dict(
                        context_parallel_size=cp,
                        algorithm=name,
                        ulysses_degree=degree,
                        window_size=window,
                        batch_layout=layout,
                        kv_exchange=exchange,
                        in_flight=in_flight,
                        ulysses_chunks=chunks,
                        mla_exchange=form,
                        kv_cache_policy=policy,
                        send_recv_overlap=row.exchange is not None,
                    )
                    yield name, arguments


def search(
    cp: int,
    problem: Problem,
    setup: TrainingSetup,
    cluster: Cluster,
    mask_type: MaskType = "causal",
    policies: Policies = KV_CACHE_POLICIES,
) -> Found:
    """Trace and time every setting that config.py's own rules allow, with these KV cache policies."""
    search_one = partial(_search_one, problem=problem, setup=setup, cluster=cluster)
    found: list[Candidate] = []
    first_rule: dict[str, str] = {}
    further: list[ContextParallelConfig] = []
    latents = problem.latent is not None and problem.layer is None
    kinds = problem.layout_documents is not None, _is_mesh(problem, cluster), latents
    for name, arguments in variants(cp, *kinds):
        is_sparse = problem.layer is not None
        if arguments["kv_cache_policy"] not in (policies if not is_sparse else (None,)):
            continue
        if is_sparse and ALGORITHMS[name].exchange != "allgather":
            first_rule.setdefault(name, SPARSE)
            continue
        try:
            config = ContextParallelConfig(**arguments, attention_mask_type=mask_type)
            if _is_plain(config):
                found.append(search_one(config))
            else:
                further.append(config)
        except ValueError as error:
            first_rule.setdefault(name, str(error))
    worth = _worth_more(found)
    for config in further:
        if config.hierarchy in worth:
            with suppress(ValueError):  # what excludes a plain setting was said; a number of groups may not fit heads
                found.append(search_one(config))
    found.sort(key=_rank)
    working = {candidate.config.algorithm for candidate in found}
    return Found(tuple(found), {name: rule for name, rule in first_rule.items() if name not in working})


def _search_one(config: ContextParallelConfig, problem: Problem, setup: TrainingSetup, cluster: Cluster) -> Candidate:
    """Raises ValueError where rules across settings or the engine refuse ``config``."""
    resolve(config, setup)
    return timed(config, problem, cluster)


def _is_plain(config: ContextParallelConfig) -> bool:
    return config.in_flight == config.ulysses_chunks == 1 and config.kv_exchange != "mesh"


def _worth_more(found: list[Candidate]) -> set[tuple[int, int, int]]:
    """Hierarchies of the fastest plain setting of each algorithm, where it waits: for these what hides more is looked
    at.
    """
    least: dict[str, Candidate] = {}
    for candidate in sorted(found, key=_rank):
        least.setdefault(candidate.config.algorithm, candidate)
    return {each.config.hierarchy for each in least.values() if each.exposed > WAITING * each.seconds}


def _is_mesh(problem: Problem, cluster: Cluster) -> bool:
    """Whether a rank reaches several peers of its group at once."""
    return cluster.links > 1 and cluster.devices_per_node // problem.stride > 2


def _rank(candidate: Candidate) -> tuple[float, bool, int, int]:
    """By time; of equals the one without a policy, which holds less in a ring, then the one with the fewest steps
    under way and groups of heads, then the one that sends less.
    """
    config = candidate.config
    has_policy = config.kv_cache_policy is not None
    assert isinstance(config.in_flight, int)
    extra = config.in_flight + config.ulysses_chunks
    return float(f"{candidate.seconds:.9g}"), has_policy, extra, candidate.intra_bytes + candidate.inter_bytes


def timed(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> Candidate:
    """Trace and time one setting, of several kinds of layers their mean; raises what the engine raises."""
    alike = replace(problem, is_pipeline=False)
    problem = alike if alike.layout(config) == problem.layout(config) else problem
    return mean_layer(config, problem, lambda each, kind: _timed(each, kind, cluster))


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
    """All ranks of a small group. Of a large group: the first, the last, the last of the first node; with documents
    or slices, which load ranks unevenly, also those that compute the most and those that send or receive the most.
    """
    cp = config.context_parallel_size
    if cp <= 4:
        return list(range(cp))
    some = {0, min(max(cluster.devices_per_node // problem.stride, 1), cp) - 1, cp - 1}
    uneven = problem.cu_seqlens is not None or problem.attention_slices is not None
    return sorted(some | _busiest(config, problem, cluster) if uneven else some)


def _busiest(config: ContextParallelConfig, problem: Problem, cluster: Cluster) -> set[int]:
    """The rank with the largest attention area, and those of whose rows most travel: as keys and values in the direct
    exchange, and as gradients that return in any.
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


def hiding_tokens(
    problem: Problem, cluster: Cluster, inter: bool, causal: bool = True, elements: int | None = None
) -> float:
    """Local tokens from which a ring step's transfer hides behind its forward computation (docs/choosing.md).

    Args:
        elements: of a token that travel, all of its keys and values by default.
    """
    share, width = 0.5 if causal else 1.0, problem.dk + problem.dv
    elements = problem.kv_heads * width if elements is None else elements
    ratio = elements * problem.dtype.itemsize / (2 * share * problem.heads * width)
    return cluster.attention_rate / cluster.bandwidth(inter) * ratio


def flags(config: ContextParallelConfig) -> str:
    """The flags of a configuration, to paste."""
    return f"{flags_of(config)} --use-flash-attn"
