"""A whole training on a cluster: memory of the fullest device and time of a step, for every way to share it out.

The attention layer comes from the engine (search.py, memory.py); the rest are counts of parameters, activations and
FLOPs of a GPT as Megatron trains it: half precision with float32 gradients and a distributed optimizer, sequence
parallelism beside tensor parallelism, flash attention, no dropout, the 1F1B schedule.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mindspeed_cp.config import ContextParallelConfig, MaskType, TrainingSetup, heads_of_rank
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.memory import saved_bytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.search import Candidate, Found, search
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.trace import Problem

HALF, FLOAT = 2, 4  # bytes
OPTIMIZER = 12  # bytes for a parameter: float32 copy and Adam's two moments
Recompute = Literal["none", "full", "full, attention kept"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "full", "full, attention kept")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fuller of a first and a last pipeline stage."""

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
        tensor, data: communication of tensor and data parallelism, of which nothing is taken to hide.
        bubble: stages of the pipeline that wait.
    """

    compute: float
    context: float
    tensor: float
    data: float
    bubble: float

    @property
    def seconds(self) -> float:
        return self.compute + self.context + self.tensor + self.data + self.bubble


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
    return saved_bytes(config, problem, 0)


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
    """The first stage of 1F1B has the most micro batches in flight, the last one the logits."""
    in_flight = min(split.pp, _micro_batches(work, split))
    stages = [_stage_memory(work, split, candidate, recompute, in_flight, split.pp == 1)]
    if split.pp > 1:
        stages.append(_stage_memory(work, split, candidate, recompute, 1, True))
    return max(stages, key=lambda stage: stage.total)


def _stage_memory(
    work: Work, split: Split, candidate: Candidate, recompute: Recompute, in_flight: int, is_last: bool
) -> Memory:
    model, layers = work.model, work.model.num_layers // split.pp
    tokens = -(-work.seq_length // split.cp) * work.micro_batch
    parameters = (layers * model.layer_parameters + model.vocab * model.hidden) // split.tp
    if split.pp == 1 and not model.tied:
        parameters += model.vocab * model.hidden // split.tp
    of_attention = _attention_bytes(candidate.config, problem_of(work, split))
    # Inputs of both norms and of the projections after them, and the MLP's own; all are split over tp.
    mlp = (3 if model.gated else 2) * model.ffn
    of_layer = tokens * HALF * (4 * model.hidden + mlp) // split.tp
    entry = tokens * HALF * model.hidden // split.tp
    if recompute == "none":
        activations, attention_bytes = in_flight * layers * of_layer, in_flight * layers * of_attention
    else:
        activations = in_flight * layers * entry + of_layer  # the inputs of all, and one that is recomputed
        kept = in_flight * layers if recompute == "full, attention kept" else 1
        attention_bytes = kept * of_attention
    logits = tokens * model.vocab * (HALF + FLOAT) // split.tp if is_last else 0
    optimizer = parameters * OPTIMIZER // (split.dp * split.cp)
    return Memory(parameters * HALF, parameters * FLOAT, optimizer, activations, attention_bytes, logits)


def _step(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    model, layers, count = work.model, work.model.num_layers // split.pp, _micro_batches(work, split)
    tokens = -(-work.seq_length // split.cp) * work.micro_batch
    again = 0 if recompute == "none" else 1
    attention_again = 1 if recompute == "full" else 0
    passes = 3 + again  # forward; backward counts twice
    matrices = 2 * tokens * passes * model.layer_parameters / split.tp / cluster.rate
    output = (
        2 * tokens * 3 * model.vocab * model.hidden / split.tp / cluster.rate
    )  # the last stage's, and so the slowest's
    of_attention = candidate.compute + attention_again * candidate.forward.compute
    exposed = candidate.exposed + attention_again * candidate.forward.exposed
    # A gather and a scatter around attention and around the MLP, as many backward, and again where recomputed.
    inter = split.tp > cluster.devices_per_node
    moved = tokens * model.hidden * HALF * (split.tp - 1) / split.tp
    tensor = (8 + 4 * again) * (moved / cluster.bandwidth(inter) + cluster.latency) if split.tp > 1 else 0.0
    compute, context, tensor = layers * (matrices + of_attention) + output, layers * exposed, layers * tensor
    parameters = layers * model.layer_parameters / split.tp
    members = split.dp * split.cp
    data = (
        parameters
        * (FLOAT + HALF)
        * (members - 1)
        / members
        / cluster.bandwidth(members * split.tp > cluster.devices_per_node)
    )
    bubble = (split.pp - 1) * (compute + context + tensor)
    return Step(count * compute, count * context, count * tensor, data, bubble)


def _micro_batches(work: Work, split: Split) -> int:
    return work.global_batch // (split.dp * work.micro_batch)


def tokens_per_second(work: Work, plan: Plan) -> float:
    """Of the whole cluster."""
    return work.global_batch * work.seq_length / plan.step.seconds
