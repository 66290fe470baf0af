"""A whole training on a cluster: memory of the fullest device and time of a step, for every way to share it out.

The attention layer comes from the engine (search.py, memory.py), the rest from stages.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import islice

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.layers import HALF
from mindspeed_cp.planner.memory import AttentionBytes, kept_bytes, most_bytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.search import Candidate, Found, Policies, search, timed
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.stages import RECOMPUTES, Memory, Recompute, Step, kinds_of_stages, stage_memory, stage_step
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.config import KV_CACHE_POLICIES, ContextParallelConfig, MaskType
from mindspeed_cp.settings.rules import heads_of_rank
from mindspeed_cp.settings.training_setup import TrainingSetup


@dataclass(frozen=True)
class Plan:
    """One way to train."""

    split: Split
    attention: Candidate
    recompute: Recompute
    memory: Memory
    step: Step


@dataclass(frozen=True)
class Option:
    """One way to train of which it is not known yet whether it fits.

    Args:
        is_bound: the times are lower bounds; a KV cache policy's are traced where they matter.
    """

    split: Split
    attention: Candidate
    recompute: Recompute
    step: Step
    is_bound: bool = False


def plans(
    work: Work,
    devices: int,
    memory: float,
    cluster: Cluster,
    fixed: dict[str, int],
    *,
    most: int = 10,
    even_stages: bool = False,
) -> tuple[list[Plan], dict[str, str]]:
    """(the ``most`` fastest ways that fit, fastest first; of what is excluded the first rule).

    Args:
        memory: bytes of a device.
        fixed: sizes of Split that are given.
        even_stages: leave out pipelines whose last stage is shorter.

    Raises:
        ValueError: no split of the devices exists.
    """
    all_options, excluded = options(work, devices, cluster, fixed)
    if even_stages:
        all_options = [option for option in all_options if not option.split.last_layers]
    found = list(islice(fitting(work, all_options, memory, cluster), most))
    if not found and all_options:
        smallest = _smallest(work, all_options)
        excluded["everything"] = (
            f"the least that is needed is {smallest.memory.total / 1e9:,.1f} GB of --memory {memory / 1e9:,.1f} GB, by "
            f"{sizes(smallest.split)}, recompute {smallest.recompute}; use more --devices or a shorter --seq-length."
        )
    return sorted(found, key=lambda plan: (plan.step.seconds, plan.memory.total)), excluded


def options(work: Work, devices: int, cluster: Cluster, fixed: dict[str, int]) -> tuple[list[Option], dict[str, str]]:
    """(every way to train; of what is excluded the first rule); errors as ``plans`` raises."""
    found: list[Option] = []
    excluded: dict[str, str] = {}
    # Ways of one size together: they share the plans of their documents.
    for split in sorted(splits(work, devices, cluster, fixed, excluded), key=lambda split: split.cp):
        layer = attention(work, split, cluster)
        for name, rule in layer.excluded.items() if split.cp > 1 else ():
            if rule not in excluded.values():
                excluded[f"{name} at cp {split.cp}, tp {split.tp}"] = rule
        if problem_of(work, split).layout_documents is None and work.documents is not None and split.cp > 1:
            excluded["--cp-batch-layout balanced"] = (
                "it goes by documents, which every row of a micro batch and every stage of a pipeline must share; use "
                "--micro-batch 1 and --pp 1."
            )
        for candidate, is_bound in _with_policies(layer) if split.cp > 1 else [(layer.candidates[0], False)]:
            for recompute in RECOMPUTES if split.cp > 1 else RECOMPUTES[:2]:
                step = _step(work, split, candidate, recompute, cluster)
                found.append(Option(split, candidate, recompute, step, is_bound))
    return found, excluded


def _with_policies(layer: Found) -> Iterator[tuple[Candidate, bool]]:
    """(candidate, whether its time is a lower bound): a KV cache policy can save what backward waits, and no more."""
    for candidate in layer.candidates:
        yield candidate, False
        for policy in KV_CACHE_POLICIES:
            if policy is not None:
                config = replace(candidate.config, kv_cache_policy=policy)
                yield replace(candidate, config=config, backward=replace(candidate.backward, exposed=0.0)), True


def fitting(work: Work, all_options: list[Option], memory: float, cluster: Cluster) -> Iterator[Plan]:
    """The options that fit, fastest first, of equals the one that sends less. What attention needs and a policy saves
    is counted only where the rest leaves room for it.
    """
    waiting = [(option.step.seconds, number, option) for number, option in enumerate(all_options)]
    heapify(waiting)
    seen: set[tuple[object, ...]] = set()
    while waiting:
        _, number, option = heappop(waiting)
        split, recompute = option.split, option.recompute
        if _memory(work, option, exact=False).total > memory:
            continue
        if option.is_bound:
            candidate = timed(option.attention.config, problem_of(work, split), cluster)
            option = Option(split, candidate, recompute, _step(work, split, candidate, recompute, cluster))
            heappush(waiting, (option.step.seconds, number, option))
            continue
        alike = split, recompute, f"{option.step.seconds:.9g}"
        if alike not in seen and (plan := _plan(work, option)).memory.total <= memory:
            seen.add(alike)
            yield plan


def _smallest(work: Work, all_options: list[Option]) -> Plan:
    """The one that needs the least memory."""
    by_bound = sorted(all_options, key=lambda option: _memory(work, option, exact=False).total)
    best = _plan(work, by_bound[0])
    for option in by_bound[1:]:
        if _memory(work, option, exact=False).total >= best.memory.total:
            break
        best = min(best, _plan(work, option), key=lambda plan: plan.memory.total)
    return best


def _plan(work: Work, option: Option) -> Plan:
    return Plan(option.split, option.attention, option.recompute, _memory(work, option), option.step)


def attention(work: Work, split: Split, cluster: Cluster, policies: Policies = (None,)) -> Found:
    """The settings of context parallelism for one layer, timed, with these KV cache policies; those of one (tp, cp) are
    searched once.
    """
    model = work.model
    return _searched(split.cp, problem_of(work, split), model, split.tp, cluster, work.mask_type, policies)


def problem_of(work: Work, split: Split) -> Problem:
    """One layer's attention."""
    model = work.model
    heads = heads_of_rank(model.num_heads, model.num_kv_heads, split.tp)
    return Problem(
        work.seq_length,
        *heads,
        model.dk,
        model.dv,
        batch=work.micro_batch,
        cu_seqlens=work.documents,
        stride=split.tp,
        is_pipeline=split.pp > 1 and work.documents is not None,
    )


@lru_cache(maxsize=256)
def _searched(
    cp: int, problem: Problem, model: ModelShape, tp: int, cluster: Cluster, mask_type: MaskType, policies: Policies
) -> Found:
    setup = TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=problem.seq_len,
        tensor_parallel_size=tp,
    )
    return search(cp, problem, setup, cluster, mask_type, policies)


@lru_cache(maxsize=4096)
def _kept_bytes(config: ContextParallelConfig, problem: Problem) -> int:
    return kept_bytes(config, problem, 0)


def _least(problem: Problem, cp: int) -> AttentionBytes:
    """What every setting needs at least: out, and the query from forward to backward."""
    tokens = problem.seq_len // cp * problem.batch * problem.heads
    return AttentionBytes(tokens * (problem.dk + problem.dv) * HALF, 0, 0)


def planned(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Plan:
    """Memory and time of one way to train."""
    return _plan(work, Option(split, candidate, recompute, _step(work, split, candidate, recompute, cluster)))


def _memory(work: Work, option: Option, exact: bool = True) -> Memory:
    """The first stages of 1F1B have the most micro batches in flight, the last one the logits.

    Args:
        exact: count attention's memory; else a lower bound of it.
    """
    split = option.split
    problem, config = problem_of(work, split), option.attention.config
    one = most_bytes(config, problem) if exact else _least(problem, split.cp)
    left = one.saved if option.recompute == "none" else 0  # of every layer but the one that runs
    if option.recompute == "full, attention kept" and exact:
        left = _kept_bytes(config, problem)
    stages = [stage_memory(work, split, option.recompute, number, one, left) for number in kinds_of_stages(work, split)]
    return max(stages, key=lambda stage: stage.total)


def _step(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    """Every stage as long as the slowest one; the last one has the output too."""
    steps = [stage_step(work, split, candidate, recompute, cluster, number) for number in kinds_of_stages(work, split)]
    return max(steps, key=lambda step: step.seconds)


def tokens_per_second(work: Work, plan: Plan) -> float:
    """Of the whole cluster."""
    return work.global_batch * work.seq_length / plan.step.seconds
