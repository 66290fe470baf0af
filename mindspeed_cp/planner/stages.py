"""Memory of a pipeline stage and the time of its step: attention's, which the engine gives, and the layers around it.

Counts parameters, activations and FLOPs of a GPT as Megatron trains it: half precision with float32 gradients and a
distributed optimizer, sequence parallelism with tensor parallelism, flash attention, no dropout, the 1F1B schedule.
Experts are assumed to be evenly loaded; tokens travel with Megatron's all-to-all dispatcher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.memory import AttentionBytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.timing import Candidate

HALF, FLOAT = 2, 4  # bytes
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


@dataclass(frozen=True)
class Held:
    """The part of one layer that a rank holds.

    Args:
        parameters, routed: number of parameters without the routed experts, and of the routed experts.
        activations: bytes that the backward pass of one micro batch needs, without those of attention.
    """

    parameters: int
    routed: int
    activations: int


@dataclass(frozen=True)
class Forward:
    """Seconds of one micro batch in the forward pass of one layer, without the attention kernel.

    Args:
        compute: matrix products and other memory traffic.
        tensor, expert: communication of tensor and expert parallelism.
    """

    compute: float
    tensor: float
    expert: float


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


def local_tokens(work: Work, split: Split) -> int:
    """Tokens of one micro batch on one rank of the context-parallel group."""
    return -(-work.seq_length // split.cp) * work.micro_batch


def held(work: Work, split: Split, with_experts: bool) -> Held:
    model, tokens = work.model, local_tokens(work, split)
    counts, experts = model.layer(with_experts), model.experts if with_experts else None
    # Inputs of both norms and of the projections after them, low-rank inputs twice, and MLP inputs; split over tp.
    width = 4 * model.hidden + (2 * (model.latent.q_rank + model.latent.kv_rank) if model.latent else 0)
    router = routed = 0
    if experts:
        width += model.matrices * experts.shared_ffn
        # Inputs and activations of a token's experts; all tensor-parallel ranks of an expert get the whole input.
        width += experts.topk * (model.hidden * split.etp + model.matrices * experts.ffn)
        router = 2 * FLOAT * experts.num  # logits and scores
        routed = counts.routed // (split.ep * split.etp)
    else:
        width += model.matrices * model.ffn
    return Held(counts.split // split.tp + counts.whole, routed, tokens * (HALF * width + router) // split.tp)


def forward(work: Work, split: Split, cluster: Cluster, with_experts: bool) -> Forward:
    model, tokens = work.model, local_tokens(work, split)
    compute = sum(
        cluster.product_seconds(flops, rows, columns)
        for flops, rows, columns in _products(model, tokens, split, with_experts)
    )
    # Each activation is written once and read once.
    compute += 2 * held(work, split, with_experts).activations / cluster.memory_bandwidth
    row = tokens * model.hidden * HALF / split.tp  # bytes of the tokens that a rank holds between layers
    # A gather before and a scatter after attention, and the same for the dense MLP or the shared experts; latent
    # attention gathers the outputs of its low-rank projections.
    latent, scatter = model.latent, _exchange(row * split.tp, split.tp, 1, cluster)
    entry = (latent.q_rank or model.hidden) + latent.kv_rank + latent.rope if latent else model.hidden
    tensor = _exchange(tokens * entry * HALF, split.tp, 1, cluster) + scatter
    experts = model.experts if with_experts else None
    if not experts:
        return Forward(compute, tensor + 2 * scatter, 0.0)
    tensor += 2 * scatter if experts.shared_ffn else 0
    tensor += 2 * _exchange(experts.topk * row * split.etp, split.etp, 1, cluster)
    return Forward(compute, tensor, 2 * _exchange(experts.topk * row, split.ep, split.etp, cluster))


def _products(model: ModelShape, tokens: int, split: Split, with_experts: bool) -> Iterator[tuple[float, float, float]]:
    """(FLOPs, rows, smaller other size) of a rank's matrix products: projections of attention, MLP, experts."""
    counts, experts = model.layer(with_experts), model.experts if with_experts else None
    shared = experts.shared_ffn if experts else model.ffn
    mlp = model.matrices * model.hidden * shared
    narrow = (model.latent.q_rank or model.latent.kv_rank) if model.latent else model.hidden
    width = min(narrow, model.num_heads * model.dk / split.tp)
    yield 2 * tokens * (counts.active - counts.visited - mlp) / split.tp, tokens, width
    if mlp:
        yield 2 * tokens * mlp / split.tp, tokens, min(model.hidden, shared / split.tp)
    if experts:
        visits = tokens / split.tp * split.ep * split.etp * experts.topk / experts.num  # of one expert
        yield 2 * tokens * counts.visited / split.tp, visits, min(model.hidden, experts.ffn / split.etp)


def _exchange(size: float, members: int, stride: int, cluster: Cluster) -> float:
    """Seconds for every member to send each other member its share of ``size`` bytes.

    Args:
        stride: distance of consecutive group members in global ranks.
    """
    near = min(max(cluster.devices_per_node // stride, 1), members)  # members per node
    parts = {False: size * (near - 1) / members, True: size * (members - near) / members}
    return max(
        cluster.latency + part / cluster.bandwidth(inter, near - 1) if part else 0.0 for inter, part in parts.items()
    )
