"""One training plan on a cluster: memory of the fullest device and time of a step.

The attention layer is taken from the engine (timing.py, memory.py), the rest from stages.py; fitting.py searches for
plans that fit.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.memory import AttentionBytes, kept_bytes, most_bytes
from mindspeed_cp.planner.other_layers import LinearLayer, SparseLayer
from mindspeed_cp.planner.search import Found, Policies, search
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.stages import (
    FLOAT,
    HALF,
    Memory,
    Recompute,
    Step,
    kinds_of_stages,
    local_tokens,
    stage_memory,
    stage_step,
)
from mindspeed_cp.planner.timing import Candidate
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.rules import heads_of_rank
from mindspeed_cp.settings.training_setup import TrainingSetup

MARGIN = 0.9  # usable fraction of a device's memory; the rest is for memory that is not counted


@dataclass(frozen=True)
class Plan:
    """One training plan: split, setting and recomputation, with memory and time."""

    split: Split
    attention: Candidate
    recompute: Recompute
    memory: Memory
    step: Step


def is_tight(plan: Plan, memory: float) -> bool:
    """Whether it leaves less than a tenth of the memory for allocator fragments and buffers of libraries."""
    return plan.memory.total > MARGIN * memory


@lru_cache(maxsize=64)
def area(work: Work) -> float:
    """Pairs of query and key of a micro batch that attention computes in the mean layer."""
    rows, seq, (window, share) = work.documents, work.seq_length, work.model.limits
    every = rows if rows is not None and not isinstance(rows[0], int) else [rows or (0, seq)] * work.micro_batch
    total = 0.0
    for row in every:
        for start, stop in pairwise(row):
            length = stop - start
            whole = length * (length + 1) / 2 if work.mask_type == "causal" else length**2
            short = min(window, length)
            seen = short * length - short * (short - 1) / 2
            total += (1 - share) * whole + share * (seen if window else whole)
    return total * (1 - work.model.linear_share)


def attention(work: Work, split: Split, cluster: Cluster, policies: Policies = (None,)) -> Found:
    """Return timed settings of context parallelism for one layer, with these KV cache policies; cached per (tp, cp)."""
    return search(split.cp, problem_of(work, split), setup_of(work, split), cluster, work.mask_type, policies)


def setup_of(work: Work, split: Split) -> TrainingSetup:
    """Return the setup that rules across settings need."""
    model = work.model
    return TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=work.seq_length,
        tensor_parallel_size=split.tp,
    )


def problem_of(work: Work, split: Split) -> Problem:
    """Return the attention problem of one layer."""
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
        windowed=(model.window, model.windowed_share) if model.window else None,
        latent=(model.latent.rope, model.latent.kv_rank) if model.latent else None,
        linear=(LinearLayer.of(model, split.tp), model.linear_share) if model.linear else None,
        layer=SparseLayer.of(model, split.tp) if model.indexer else None,
    )


def _least_saved(problem: Problem, cp: int) -> int:
    """Least bytes of any setting from forward to backward: query, out, and the sent form of key and value."""
    elements = problem.heads * (problem.dk + problem.dv) + problem.least_row_elements(cp)
    return problem.seq_len // cp * problem.batch * elements * HALF


def _least_kept(problem: Problem, cp: int, degree: int) -> int:
    """Least bytes that any setting of a Ulysses degree keeps per layer: out and its statistics, and with a degree above
    1 the tensors that its exchange received and the out that it sent.
    """
    elements = problem.heads * problem.dv
    if degree > 1:
        elements += problem.heads * (problem.dk + problem.dv) + problem.least_row_elements(cp)
    return problem.seq_len // cp * problem.batch * (elements * HALF + problem.heads * FLOAT)


def planned(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Plan:
    """Return the plan with its memory and time."""
    step = step_of(work, split, candidate, recompute, cluster)
    return Plan(split, candidate, recompute, memory_of(work, split, recompute, candidate.config), step)


def memory_of(work: Work, split: Split, recompute: Recompute, config: ContextParallelConfig) -> Memory:
    """Memory of the fullest stage, with attention's memory counted by the engine."""
    problem = replace(problem_of(work, split), windowed=None, linear=None, layer=None)
    kept = kept_bytes(config, problem, 0) if recompute == "full, attention kept" else 0
    return _memory(work, split, recompute, most_bytes(config, problem), kept)


def least_memory(work: Work, split: Split, recompute: Recompute, degree: int = 1) -> int:
    """A lower bound of the bytes that every setting of a Ulysses degree needs."""
    problem = problem_of(work, split)
    one = AttentionBytes(_least_saved(problem, split.cp), 0, 0)
    return _memory(work, split, recompute, one, _least_kept(problem, split.cp, degree)).total


def _memory(work: Work, split: Split, recompute: Recompute, one: AttentionBytes, kept: int) -> Memory:
    """Memory of the fullest stage: the first stages of 1F1B have the most micro batches in flight, the last the logits.

    Args:
        one: attention of the running layer. kept: bytes that every other layer keeps if attention is kept.
    """
    model, saved, kept = work.model, one.saved, round(work.model.kept_share * kept)
    if model.linear is not None:
        state = local_tokens(work, split) * HALF * LinearLayer.of(model, split.tp).saved_elements
        saved = round((1 - model.linear_share) * saved + model.linear_share * state)
    left = {"none": saved, "full": 0, "full, attention kept": kept}[recompute]
    stages = [stage_memory(work, split, recompute, number, one, left) for number in kinds_of_stages(work, split)]
    return max(stages, key=lambda stage: stage.total)


def step_of(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    """Time of a step in which every stage takes as long as the slowest; the last stage also has the output."""
    steps = [stage_step(work, split, candidate, recompute, cluster, number) for number in kinds_of_stages(work, split)]
    return max(steps, key=lambda step: step.seconds)


def utilization(work: Work, plan: Plan, cluster: Cluster, causal: bool = True) -> float:
    """Model FLOPs of a step, without recomputation, divided by the devices' peak FLOPs in the same time (MFU).

    Args:
        causal: for causal attention count only the computed pairs; else all pairs, as NVIDIA's and Megatron's figures.
    """
    model, devices = work.model, plan.split.stage * plan.split.pp
    of_row = area(work if causal else replace(work, mask_type="full")) / work.micro_batch
    products = model.active_parameters - (0 if model.tied else 1) * model.vocab * model.hidden
    pairs = 6 * of_row * model.num_layers * model.num_heads * (model.dk + model.dv)
    flops = work.global_batch * (6 * products * work.seq_length + pairs)
    return flops / (devices * cluster.flops * plan.step.seconds)


def tokens_per_second(work: Work, plan: Plan) -> float:
    """Tokens per second of the whole cluster."""
    return work.global_batch * work.seq_length / plan.step.seconds
