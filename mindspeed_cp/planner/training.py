"""A whole training on a cluster: memory of the fullest device and time of a step, for every way to share it out.

The attention layer comes from the engine (search.py, memory.py); the rest are counts of parameters, activations and
FLOPs of a GPT as Megatron trains it: half precision with float32 gradients and a distributed optimizer, sequence
parallelism beside tensor parallelism, flash attention, no dropout, the 1F1B schedule.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Literal

from mindspeed_cp.config import KV_CACHE_POLICIES, ContextParallelConfig, MaskType, TrainingSetup
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.layers import FLOAT, HALF, forward, held, local_tokens
from mindspeed_cp.planner.memory import AttentionBytes, kept_bytes, most_bytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.search import Candidate, Found, search, timed
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.rules import heads_of_rank

OPTIMIZER = 12  # bytes for a parameter: float32 copy and Adam's two moments
Recompute = Literal["none", "full", "full, attention kept"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "full", "full, attention kept")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline stage.

    Args:
        attention: what attention keeps from the forward to the backward pass.
        buffers: the most that attention holds beyond that while a layer runs, reused memory included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    buffers: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Step:
    """Seconds of one step.

    Args:
        compute: kernels, attention's and what is recomputed included.
        context: communication of context parallelism that does not hide behind attention.
        tensor, expert, data: communication of tensor, expert and data parallelism, of which nothing is taken to hide.
        bubble: stages of the pipeline that wait.
    """

    compute: float
    context: float
    tensor: float
    expert: float
    data: float
    bubble: float

    @property
    def seconds(self) -> float:
        return self.compute + self.context + self.tensor + self.expert + self.data + self.bubble


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


def attention(work: Work, split: Split, cluster: Cluster) -> Found:
    """The settings of context parallelism for one layer, timed; those of one (tp, cp) are searched once."""
    model = work.model
    return _searched(split.cp, problem_of(work, split), model, split.tp, cluster, work.mask_type)


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
def _searched(cp: int, problem: Problem, model: ModelShape, tp: int, cluster: Cluster, mask_type: MaskType) -> Found:
    setup = TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=problem.seq_len,
        tensor_parallel_size=tp,
    )
    return search(cp, problem, setup, cluster, mask_type, policies=(None,))


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
    stages = [
        _stage_memory(work, split, option.recompute, number, one, left) for number in _kinds_of_stages(work, split)
    ]
    return max(stages, key=lambda stage: stage.total)


def _stage_memory(
    work: Work, split: Split, recompute: Recompute, number: int, one: AttentionBytes, left: int
) -> Memory:
    """one: attention of the layer that runs; left: bytes that every other one has left."""
    model, is_last = work.model, number == split.pp - 1
    in_flight = min(split.pp - number, _micro_batches(work, split))
    layers = [held(work, split, kind) for kind, count in _kinds(work, split, number) for _ in range(count)]
    tokens, routed = local_tokens(work, split), sum(layer.routed for layer in layers)
    parameters = sum(layer.parameters for layer in layers) + _tables(work, split, number)
    if recompute == "none":
        activations = in_flight * sum(layer.activations for layer in layers)
    else:  # the inputs of all, and one that is recomputed
        entry = tokens * HALF * model.hidden // split.tp
        activations = in_flight * len(layers) * entry + max(layer.activations for layer in layers)
    attention_sum = (in_flight * len(layers) - 1) * left + one.saved
    logits = tokens * model.vocab * (HALF + FLOAT) // split.tp if is_last else 0
    optimizer = parameters * OPTIMIZER // (split.dp * split.cp) + (routed * OPTIMIZER // split.edp if routed else 0)
    parameters += routed
    return Memory(
        weights=parameters * HALF,
        gradients=parameters * FLOAT,
        optimizer=optimizer,
        activations=activations,
        attention=attention_sum,
        buffers=one.passing + one.buffers,
        logits=logits,
    )


def _kinds_of_stages(work: Work, split: Split) -> list[int]:
    """The stages that differ: the first of every kind, by its layers, by its tables and by the output."""
    first: dict[tuple[object, ...], int] = {}
    for number in range(split.pp):
        first.setdefault((work.model.stage(number, split.pp), number == 0, number == split.pp - 1), number)
    return list(first.values())


def _tables(work: Work, split: Split, number: int) -> int:
    """Parameters of the embeddings and of the output that a rank of a stage holds; tied, one stage holds them once."""
    model, is_first, is_last = work.model, number == 0, number == split.pp - 1
    words = is_first + (is_last and not (is_first and model.tied))
    positions = work.seq_length * model.hidden if is_first and model.learned_positions else 0
    return words * model.vocab * model.hidden // split.tp + positions


def _kinds(work: Work, split: Split, number: int) -> list[tuple[bool, int]]:
    """(whether they have experts, how many) of the layers of a stage."""
    without, with_experts = work.model.stage(number, split.pp)
    return [(kind, count) for kind, count in ((False, without), (True, with_experts)) if count]


def _step(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    """Every stage as long as the slowest one; the last one has the output too."""
    steps = [
        _stage_step(work, split, candidate, recompute, cluster, number) for number in _kinds_of_stages(work, split)
    ]
    return max(steps, key=lambda step: step.seconds)


def _stage_step(
    work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster, number: int
) -> Step:
    model, count, kinds = work.model, _micro_batches(work, split), _kinds(work, split, number)
    again = 0 if recompute == "none" else 1
    attention_again = 1 if recompute == "full" else 0
    of_attention = candidate.compute + attention_again * candidate.forward.compute
    exposed = candidate.exposed + attention_again * candidate.forward.exposed
    compute = context = tensor = expert = 0.0
    parameters, routed = _tables(work, split, number), 0
    for with_experts, layers in kinds:
        layer, size = forward(work, split, cluster, with_experts), held(work, split, with_experts)
        compute += layers * ((3 + again) * layer.flops / cluster.rate + of_attention)  # backward counts twice
        context += layers * exposed
        tensor += layers * (2 + again) * layer.tensor
        expert += layers * (2 + again) * layer.expert
        parameters, routed = parameters + layers * size.parameters, routed + layers * size.routed
    if number == split.pp - 1:
        compute += 3 * 2 * local_tokens(work, split) * model.vocab * model.hidden / split.tp / cluster.rate
    inter = split.stage > cluster.devices_per_node
    copies = ((parameters, split.dp * split.cp), (routed, split.edp if routed else 1))
    moved = sum(size * (FLOAT + HALF) * (members - 1) / members for size, members in copies)
    bubble = (split.pp - 1) * (compute + context + tensor + expert)
    data = moved / cluster.bandwidth(inter)
    return Step(count * compute, count * context, count * tensor, count * expert, data, bubble)


def _micro_batches(work: Work, split: Split) -> int:
    return work.global_batch // (split.dp * work.micro_batch)


def tokens_per_second(work: Work, plan: Plan) -> float:
    """Of the whole cluster."""
    return work.global_batch * work.seq_length / plan.step.seconds
