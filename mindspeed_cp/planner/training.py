"""A whole training on a cluster: memory of the fullest device and time of a step, for every way to share it out.

The attention layer comes from the engine (search.py, memory.py); the rest are counts of parameters, activations and
FLOPs of a GPT as Megatron trains it: half precision with float32 gradients and a distributed optimizer, sequence
parallelism beside tensor parallelism, flash attention, no dropout, the 1F1B schedule.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mindspeed_cp.config import ContextParallelConfig, MaskType, TrainingSetup
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.layers import FLOAT, HALF, forward, held, local_tokens
from mindspeed_cp.planner.memory import attention_bytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.search import Candidate, Found, search
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.rules import heads_of_rank

OPTIMIZER = 12  # bytes for a parameter: float32 copy and Adam's two moments
Recompute = Literal["none", "full", "full, attention kept"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "full", "full, attention kept")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.attention + self.logits


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


def plans(
    work: Work, devices: int, memory: float, cluster: Cluster, fixed: dict[str, int]
) -> tuple[list[Plan], dict[str, str]]:
    """(every way that fits, fastest first; of what is excluded the first rule).

    Args:
        memory: bytes of a device.
        fixed: sizes of Split that are given.

    Raises:
        ValueError: no split of the devices exists.
    """
    found: dict[tuple[object, ...], Plan] = {}
    excluded: dict[str, str] = {}
    smallest: Plan | None = None
    for split in splits(work, devices, cluster, fixed, excluded):
        layer = attention(work, split, cluster)
        for name, rule in layer.excluded.items() if split.cp > 1 else ():
            if rule not in excluded.values():
                excluded[f"{name} at cp {split.cp}, tp {split.tp}"] = rule
        for candidate in layer.candidates if split.cp > 1 else layer.candidates[:1]:
            for recompute in RECOMPUTES if split.cp > 1 else RECOMPUTES[:2]:
                plan = planned(work, split, candidate, recompute, cluster)
                smallest = plan if smallest is None else min(smallest, plan, key=lambda one: one.memory.total)
                if plan.memory.total <= memory:
                    found.setdefault((split, plan.step, plan.memory), plan)  # of equals the first, which sends less
    if not found and smallest is not None:
        excluded["everything"] = (
            f"the least that is needed is {smallest.memory.total / 1e9:,.1f} GB of --memory {memory / 1e9:,.1f} GB, by "
            f"{sizes(smallest.split)}, recompute {smallest.recompute}; use more --devices or a shorter --seq-length."
        )
    return sorted(found.values(), key=lambda plan: (plan.step.seconds, plan.memory.total)), excluded


def attention(work: Work, split: Split, cluster: Cluster) -> Found:
    """The settings of context parallelism for one layer, timed; those of one (tp, cp) are searched once."""
    model = work.model
    return _searched(split.cp, problem_of(work, split), model, split.tp, cluster, work.mask_type)


def problem_of(work: Work, split: Split) -> Problem:
    """One layer's attention."""
    model = work.model
    heads = heads_of_rank(model.num_heads, model.num_kv_heads, split.tp)
    return Problem(work.seq_length, *heads, model.dk, model.dv, batch=work.micro_batch, stride=split.tp)


@lru_cache(maxsize=256)
def _searched(cp: int, problem: Problem, model: ModelShape, tp: int, cluster: Cluster, mask_type: MaskType) -> Found:
    setup = TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=problem.seq_len,
        tensor_parallel_size=tp,
    )
    return search(cp, problem, setup, cluster, mask_type)


@lru_cache(maxsize=4096)
def _attention_bytes(config: ContextParallelConfig, problem: Problem) -> int:
    return attention_bytes(config, problem, 0).saved


def planned(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Plan:
    """Memory and time of one way to train."""
    return Plan(
        split,
        candidate,
        recompute,
        _memory(work, split, candidate, recompute),
        _step(work, split, candidate, recompute, cluster),
    )


def _memory(work: Work, split: Split, candidate: Candidate, recompute: Recompute) -> Memory:
    """The first stages of 1F1B have the most micro batches in flight, the last one the logits."""
    first: dict[tuple[int, int, bool], int] = {}  # kinds of stages, each with its first
    for number in range(split.pp):
        first.setdefault((*work.model.stage(number, split.pp), number == split.pp - 1), number)
    stages = [_stage_memory(work, split, candidate, recompute, number) for number in {0, *first.values()}]
    return max(stages, key=lambda stage: stage.total)


def _stage_memory(work: Work, split: Split, candidate: Candidate, recompute: Recompute, number: int) -> Memory:
    model, is_last = work.model, number == split.pp - 1
    in_flight = min(split.pp - number, _micro_batches(work, split))
    layers = [held(work, split, kind) for kind, count in _kinds(work, split, number) for _ in range(count)]
    tokens, table = local_tokens(work, split), model.vocab * model.hidden // split.tp
    tables = (number == 0) + (is_last and not (split.pp == 1 and model.tied))
    parameters, routed = sum(layer.parameters for layer in layers) + tables * table, sum(each.routed for each in layers)
    of_attention = _attention_bytes(candidate.config, problem_of(work, split))
    if recompute == "none":
        activations = in_flight * sum(layer.activations for layer in layers)
        attention_bytes = in_flight * len(layers) * of_attention
    else:  # the inputs of all, and one that is recomputed
        entry = tokens * HALF * model.hidden // split.tp
        activations = in_flight * len(layers) * entry + max(layer.activations for layer in layers)
        kept = in_flight * len(layers) if recompute == "full, attention kept" else 1
        attention_bytes = kept * of_attention
    logits = tokens * model.vocab * (HALF + FLOAT) // split.tp if is_last else 0
    optimizer = parameters * OPTIMIZER // (split.dp * split.cp) + (routed * OPTIMIZER // split.edp if routed else 0)
    parameters += routed
    return Memory(parameters * HALF, parameters * FLOAT, optimizer, activations, attention_bytes, logits)


def _kinds(work: Work, split: Split, number: int) -> list[tuple[bool, int]]:
    """(whether they have experts, how many) of the layers of a stage."""
    without, with_experts = work.model.stage(number, split.pp)
    return [(kind, count) for kind, count in ((False, without), (True, with_experts)) if count]


def _step(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    """Every stage as long as the slowest one, which has the output too."""
    kinds = {work.model.stage(number, split.pp): number for number in range(split.pp)}
    steps = [_stage_step(work, split, candidate, recompute, cluster, number) for number in kinds.values()]
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
    parameters = routed = 0
    for with_experts, layers in kinds:
        layer, size = forward(work, split, cluster, with_experts), held(work, split, with_experts)
        compute += layers * ((3 + again) * layer.flops / cluster.rate + of_attention)  # backward counts twice
        context += layers * exposed
        tensor += layers * (2 + again) * layer.tensor
        expert += layers * (2 + again) * layer.expert
        parameters, routed = parameters + layers * size.parameters, routed + layers * size.routed
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
