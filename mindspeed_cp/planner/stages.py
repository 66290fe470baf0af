"""Memory of a pipeline stage, and the time of its step.

Counts parameters, activations and FLOPs of a GPT as Megatron trains it: half precision with float32 gradients and a
distributed optimizer, sequence parallelism with tensor parallelism, flash attention, no dropout, the 1F1B schedule.
"""

from dataclasses import dataclass
from typing import Literal

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.layers import FLOAT, HALF, forward, held, local_tokens
from mindspeed_cp.planner.memory import AttentionBytes
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.timing import Candidate

OPTIMIZER = 12  # bytes for a parameter: float32 copy and Adam's two moments
Recompute = Literal["none", "full", "full, attention kept"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "full", "full, attention kept")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline stage.

    Args:
        attention: what attention keeps from the forward to the backward pass.
        buffers: peak of what attention holds in addition while a layer runs, reused memory included.
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
        return int(sum(vars(self).values()))


@dataclass(frozen=True)
class Step:
    """Seconds of one step.

    Args:
        compute: kernels, including attention and recomputation, and the optimizer.
        context: communication of context parallelism that attention does not hide.
        tensor, expert, pipeline: communication of tensor and expert parallelism and between pipeline stages, assumed
            not to be hidden.
        data: communication of data parallelism that one micro batch does not hide.
        bubble: idle time of pipeline stages.
    """

    compute: float
    context: float
    tensor: float
    expert: float
    pipeline: float
    data: float
    bubble: float

    @property
    def seconds(self) -> float:
        return float(sum(vars(self).values()))


def stage_memory(work: Work, split: Split, recompute: Recompute, number: int, one: AttentionBytes, left: int) -> Memory:
    """Memory of a device of one stage.

    Args:
        number: of the stage.
        one: attention of the running layer. left: bytes that attention keeps in every other layer.
    """
    model, is_last = work.model, number == split.pp - 1
    parts = _parts_in_flight(work, split, number)
    layers = [held(work, split, kind) for kind, count in _kinds(work, split, number) for _ in range(count)]
    tokens, routed = local_tokens(work, split), sum(layer.routed for layer in layers)
    parameters = sum(layer.parameters for layer in layers) + _tables(work, split, number)
    if recompute == "none":
        activations = -(-parts * sum(layer.activations for layer in layers) // split.vpp)
    else:  # the inputs of all, and one that is recomputed
        entry = tokens * HALF * model.hidden // split.tp
        activations = parts * len(layers) * entry // split.vpp + max((layer.activations for layer in layers), default=0)
    attention_sum = (-(-parts * len(layers) // split.vpp) - 1) * left + one.saved
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


def _parts_in_flight(work: Work, split: Split, number: int) -> int:
    """Activations in flight, in parts of a stage's layers: micro batches after forward and before backward."""
    behind = split.pp - number
    if split.vpp == 1:
        return min(behind, _micro_batches(work, split))
    return min(2 * (behind - 1) + (split.vpp - 1) * split.pp + 1, _micro_batches(work, split) * split.vpp)


def kinds_of_stages(work: Work, split: Split) -> list[int]:
    """Return the first stage of every kind; kinds differ in layers, embedding tables and output."""
    first: dict[tuple[object, ...], int] = {}
    for number in range(split.pp):
        layers = work.model.stage(number, split.pp, split.ends)
        first.setdefault((layers, number == 0, number == split.pp - 1), number)
    return list(first.values())


def _tables(work: Work, split: Split, number: int) -> int:
    """Embedding and output parameters on a rank of a stage; if tied, a single stage holds them once."""
    model, is_first, is_last = work.model, number == 0, number == split.pp - 1
    words = is_first + (is_last and not (is_first and model.tied))
    positions = work.seq_length * model.hidden if is_first and model.learned_positions else 0
    return words * model.vocab * model.hidden // split.tp + positions


def _kinds(work: Work, split: Split, number: int) -> list[tuple[bool, int]]:
    """Return (whether they have experts, number) for the kinds of layers of a stage."""
    without, with_experts = work.model.stage(number, split.pp, split.ends)
    return [(kind, count) for kind, count in ((False, without), (True, with_experts)) if count]


def stage_step(
    work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster, number: int
) -> Step:
    """Time of a step in which every stage takes as long as this one."""
    model, count, kinds = work.model, _micro_batches(work, split), _kinds(work, split, number)
    again = 0 if recompute == "none" else 1
    attention_again = {"none": 0.0, "full": 1.0}.get(recompute, 1 - model.kept_share)
    of_attention = candidate.compute + attention_again * candidate.forward.compute
    exposed = candidate.exposed + attention_again * candidate.forward.exposed
    compute = context = tensor = expert = 0.0
    parameters, routed = _tables(work, split, number), 0
    for with_experts, layers in kinds:
        layer, size = forward(work, split, cluster, with_experts), held(work, split, with_experts)
        compute += layers * ((3 + again) * layer.compute + of_attention)  # backward counts twice
        context += layers * exposed
        tensor += layers * (2 + again) * layer.tensor
        expert += layers * (2 + again) * layer.expert
        parameters, routed = parameters + layers * size.parameters, routed + layers * size.routed
    if number == split.pp - 1:
        tokens, columns = local_tokens(work, split), min(model.hidden, model.vocab / split.tp)
        flops = 2 * tokens * model.vocab * model.hidden / split.tp
        compute += 3 * cluster.product_seconds(flops, tokens, columns)
    compute += 2 * FLOAT * (parameters + routed) / cluster.memory_bandwidth  # gradient accumulation
    passed = _between_stages(work, split, cluster)
    bubble = (split.pp - 1) / split.vpp * (compute + context + tensor + expert + passed)
    exchanged, updated = _data(split, parameters, routed, cluster)
    exposed_data = max(exchanged - compute, 0.0)
    return Step(
        count * compute + updated, count * context, count * tensor, count * expert, count * passed, exposed_data, bubble
    )


def _between_stages(work: Work, split: Split, cluster: Cluster) -> float:
    """Seconds to send one micro batch to the next stage and its gradient back."""
    if split.pp == 1:
        return 0.0
    size = local_tokens(work, split) * work.model.hidden * HALF / split.tp
    inter = split.stage >= cluster.devices_per_node
    return 2 * split.vpp * (cluster.latency + size / cluster.bandwidth(inter))


def _data(split: Split, parameters: int, routed: int, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds of (gradient reduction and parameter gathering, optimizer)."""
    inter = split.stage > cluster.devices_per_node
    near = min(max(cluster.devices_per_node // split.tp, 1), split.dp * split.cp)
    copies = ((parameters, split.dp * split.cp), (routed, split.edp if routed else 1))
    moved = sum(size * (FLOAT + HALF) * (members - 1) / members for size, members in copies)
    states = sum(size * (2 * OPTIMIZER + FLOAT + HALF) / members for size, members in copies)
    return moved / cluster.bandwidth(inter, near - 1), states / cluster.memory_bandwidth


def _micro_batches(work: Work, split: Split) -> int:
    return work.global_batch // (split.dp * work.micro_batch)
