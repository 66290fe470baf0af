"""One way to train on a cluster: memory of the fullest device and time of a step.

The attention layer comes from the engine (timing.py, memory.py), the rest from stages.py; fitting.py looks for the ways
that fit.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.layers import FLOAT, HALF, linear_layer, mean_saved, sparse_layer
from mindspeed_cp.planner.memory import AttentionBytes, kept_bytes, most_bytes
from mindspeed_cp.planner.search import Found, Policies, search
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.stages import Memory, Recompute, Step, kinds_of_stages, stage_memory, stage_step
from mindspeed_cp.planner.timing import Candidate
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.derived import MaskType
from mindspeed_cp.settings.rules import heads_of_rank
from mindspeed_cp.settings.training_setup import TrainingSetup

MARGIN = 0.9  # of a device's memory: the rest is for what is not counted


@dataclass(frozen=True)
class Plan:
    """One way to train."""

    split: Split
    attention: Candidate
    recompute: Recompute
    memory: Memory
    step: Step


def is_tight(plan: Plan, memory: float) -> bool:
    """Whether it leaves less than a tenth for what is not counted: the allocator's fragments, buffers of libraries."""
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
    """The settings of context parallelism for one layer, timed, with these KV cache policies; those of one (tp, cp) are
    searched once.
    """
    return _searched(split.cp, problem_of(work, split), setup_of(work, split), cluster, work.mask_type, policies)


def setup_of(work: Work, split: Split) -> TrainingSetup:
    """What the rules across settings ask for."""
    model = work.model
    return TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=work.seq_length,
        tensor_parallel_size=split.tp,
    )


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
        windowed=(model.window, model.windowed_share) if model.window else None,
        latent=(model.latent.rope, model.latent.kv_rank) if model.latent else None,
        linear=(linear_layer(model, split.tp), model.linear_share) if model.linear else None,
        layer=sparse_layer(model, split.tp) if model.indexer else None,
    )


@lru_cache(maxsize=256)
def _searched(
    cp: int, problem: Problem, setup: TrainingSetup, cluster: Cluster, mask_type: MaskType, policies: Policies
) -> Found:
    return search(cp, problem, setup, cluster, mask_type, policies)


@lru_cache(maxsize=4096)
def _kept_bytes(config: ContextParallelConfig, problem: Problem) -> int:
    return kept_bytes(config, problem, 0)


def _least_saved(problem: Problem, cp: int) -> int:
    """What every setting needs at least: query, out, and what travels of key and value, from forward to backward."""
    elements = problem.heads * (problem.dk + problem.dv) + problem.least_row_elements(cp)
    return problem.seq_len // cp * problem.batch * elements * HALF


def _least_kept(problem: Problem, cp: int, degree: int) -> int:
    """What every setting of a Ulysses degree keeps at least of a layer: out and its statistics, and with a degree what
    its exchange brought and the out that it took away.
    """
    elements = problem.heads * problem.dv
    if degree > 1:
        elements += problem.heads * (problem.dk + problem.dv) + problem.least_row_elements(cp)
    return problem.seq_len // cp * problem.batch * (elements * HALF + problem.heads * FLOAT)


def planned(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Plan:
    """Memory and time of one way to train."""
    step = step_of(work, split, candidate, recompute, cluster)
    return Plan(split, candidate, recompute, memory_of(work, split, recompute, candidate.config), step)


def memory_of(work: Work, split: Split, recompute: Recompute, config: ContextParallelConfig) -> Memory:
    """With attention's memory counted on the engine."""
    problem = replace(problem_of(work, split), windowed=None, linear=None, layer=None)
    is_kept = recompute == "full, attention kept"
    kept = _kept_bytes(config, problem) if is_kept else 0
    return _memory(work, split, recompute, most_bytes(config, problem), kept)


def least_memory(work: Work, split: Split, recompute: Recompute, degree: int = 1) -> int:
    """A lower bound of the bytes that every setting of a Ulysses degree needs."""
    problem = problem_of(work, split)
    one = AttentionBytes(_least_saved(problem, split.cp), 0, 0)
    return _memory(work, split, recompute, one, _least_kept(problem, split.cp, degree)).total


def _memory(work: Work, split: Split, recompute: Recompute, one: AttentionBytes, kept: int) -> Memory:
    """The first stages of 1F1B have the most micro batches in flight, the last one the logits.

    Args:
        one: attention of the layer that runs. kept: of every other one, where its attention is kept.
    """
    saved, kept = mean_saved(work, split, one.saved), round(work.model.kept_share * kept)
    left = {"none": saved, "full": 0, "full, attention kept": kept}[recompute]
    stages = [stage_memory(work, split, recompute, number, one, left) for number in kinds_of_stages(work, split)]
    return max(stages, key=lambda stage: stage.total)


def step_of(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    """Every stage as long as the slowest one; the last one has the output too."""
    steps = [stage_step(work, split, candidate, recompute, cluster, number) for number in kinds_of_stages(work, split)]
    return max(steps, key=lambda step: step.seconds)


def model_flops(work: Work, causal: bool = True) -> float:
    """FLOPs of a step that training needs, whatever is recomputed.

    Args:
        causal: count of causal attention what is computed; else all pairs, as NVIDIA's and Megatron's figures do.
    """
    model = work.model
    of_row = area(work if causal else replace(work, mask_type="full")) / work.micro_batch
    products = model.active_parameters - (0 if model.tied else 1) * model.vocab * model.hidden
    pairs = 6 * of_row * model.num_layers * model.num_heads * (model.dk + model.dv)
    return work.global_batch * (6 * products * work.seq_length + pairs)


def utilization(work: Work, plan: Plan, cluster: Cluster, causal: bool = True) -> float:
    """Model FLOPs of a step over what the devices' peaks would do meanwhile."""
    devices = plan.split.stage * plan.split.pp
    return model_flops(work, causal) / (devices * cluster.flops * plan.step.seconds)


def tokens_per_second(work: Work, plan: Plan) -> float:
    """Of the whole cluster."""
    return work.global_batch * work.seq_length / plan.step.seconds
