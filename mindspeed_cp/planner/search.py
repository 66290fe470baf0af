"""Settings of context parallelism for one attention layer, and their times on a model of the cluster."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from mindspeed_cp.arguments.declared import flags_of
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.timing import Candidate, preference, timed
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.fields import KV_CACHE_POLICIES, KVCachePolicy, MaskType
from mindspeed_cp.settings.training_setup import TrainingSetup, resolve

Policies = tuple[KVCachePolicy | None, ...]


@dataclass(frozen=True)
class Found:
    """Candidates, fastest first, and for every algorithm without one the first rule it breaks."""

    candidates: tuple[Candidate, ...]
    excluded: dict[str, str]


# Layout, exchange and steps in flight. More steps save time only if a device reaches several peers at once.
WAYS = (("auto", "ring", 1), ("auto", "direct", 1))
OF_DOCUMENTS = (("balanced", "direct", 1),)
OF_A_MESH = (("auto", "direct", 2), ("auto", "mesh", 1), ("auto", "mesh", 2))
CHUNKS = (1, 2, 4)
SPARSE = "sparse attention gathers its keys from all ranks, whatever the algorithm is"


def variants(
    cp: int, documents: bool = False, mesh: bool = False, latents: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (algorithm, arguments of the configuration), valid or not: the configuration checks the combination.

    Args:
        documents: include the balanced layout, with the exchange that sends only the rows that documents need.
        mesh: include the exchanges that use several links at once.
        latents: for multi-latent attention, include sending heads and sending latents.
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
                    # Groups save memory themselves, and there would be too many similar settings.
                    if chunks > 1 and (policy is not None or (layout, exchange, in_flight) in OF_A_MESH):
                        continue
                    yield (
                        name,
                        dict(
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
                        ),
                    )


def allowed(
    cp: int, problem: Problem, setup: TrainingSetup, cluster: Cluster, mask_type: MaskType, first_rule: dict[str, str]
) -> Iterator[ContextParallelConfig]:
    """Yield every setting that config.py's rules allow; ``first_rule`` gets the first rule each algorithm breaks."""
    is_sparse = problem.layer is not None
    latents = problem.latent is not None and not is_sparse
    for name, arguments in variants(cp, problem.layout_documents is not None, _is_mesh(problem, cluster), latents):
        gathers = ALGORITHMS[name].exchange == "allgather"
        if is_sparse and not gathers:
            first_rule.setdefault(name, SPARSE)
        if is_sparse and (not gathers or arguments["kv_cache_policy"] is not None):
            continue
        try:
            config = ContextParallelConfig(**arguments, attention_mask_type=mask_type)
            resolve(config, setup)
        except ValueError as error:
            first_rule.setdefault(name, str(error))
        else:
            yield config


@lru_cache(maxsize=256)
def search(
    cp: int,
    problem: Problem,
    setup: TrainingSetup,
    cluster: Cluster,
    mask_type: MaskType = "causal",
    policies: Policies = KV_CACHE_POLICIES,
) -> Found:
    """Trace and time every setting that config.py's rules allow, with these KV cache policies."""
    found: list[Candidate] = []
    first_rule: dict[str, str] = {}
    further: list[ContextParallelConfig] = []
    for config in allowed(cp, problem, setup, cluster, mask_type, first_rule):
        if config.kv_cache_policy not in policies:
            continue
        if not _is_plain(config):
            further.append(config)
            continue
        try:
            found.append(timed(config, problem, cluster))
        except ValueError as error:
            first_rule.setdefault(config.algorithm, str(error))
    fastest: dict[str, Candidate] = {}
    for candidate in sorted(found, key=preference):
        fastest.setdefault(candidate.config.algorithm, candidate)
    for config in further:
        best = fastest.get(config.algorithm)
        if best and best.config.hierarchy == config.hierarchy and _may_gain(best, config):
            with suppress(ValueError):  # plain settings were checked; a number of groups may not fit the heads
                found.append(timed(config, problem, cluster))
    found.sort(key=preference)
    working = {candidate.config.algorithm for candidate in found}
    return Found(tuple(found), {name: rule for name, rule in first_rule.items() if name not in working})


def _is_plain(config: ContextParallelConfig) -> bool:
    return config.in_flight == config.ulysses_chunks == 1 and config.kv_exchange != "mesh"


def _may_gain(plain: Candidate, config: ContextParallelConfig) -> bool:
    """Whether ``config`` may hide more communication than the plain setting of its hierarchy."""
    return plain.waits_for_heads if config.ulysses_chunks > 1 else plain.waits_for_rows


def _is_mesh(problem: Problem, cluster: Cluster) -> bool:
    """Whether a rank reaches several peers of its group at once."""
    return cluster.links > 1 and cluster.devices_per_node // problem.stride > 2


def hiding_tokens(
    problem: Problem, cluster: Cluster, inter: bool, causal: bool = True, elements: int | None = None
) -> float:
    """Fewest local tokens with which a ring step's forward computation hides its transfer (docs/choosing.md).

    Args:
        elements: number of elements sent per token, by default all of its keys and values.
    """
    share, width = 0.5 if causal else 1.0, problem.dk + problem.dv
    elements = problem.kv_heads * width if elements is None else elements
    ratio = elements * problem.dtype.itemsize / (2 * share * problem.heads * width)
    return cluster.attention_rate / cluster.bandwidth(inter) * ratio


def flags(config: ContextParallelConfig) -> str:
    """Return the flags of a configuration as text to paste."""
    return f"{flags_of(config)} --use-flash-attn"
