"""The cost of one layer on a rank without its attention: parameters, activations, matrix products, communication.

Experts are assumed to be evenly loaded; tokens travel with Megatron's all-to-all dispatcher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mindspeed_cp.linear.gated_delta import DeltaHeads
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.models import Experts, LayerParameters, ModelShape
from mindspeed_cp.planner.other_layers import LinearLayer, SparseLayer
from mindspeed_cp.planner.split import Split, Work

HALF, FLOAT = 2, 4  # bytes


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


def linear_layer(model: ModelShape, tp: int) -> LinearLayer:
    """Return a tensor-parallel rank's part of a layer with a state."""
    linear = model.linear
    assert linear is not None, "the model has such layers"
    sizes = linear.key_dim, linear.value_dim, linear.decays
    return LinearLayer(DeltaHeads(linear.keys // tp, linear.values // tp, *sizes), linear.width, model.hidden)


def sparse_layer(model: ModelShape, tp: int) -> SparseLayer:
    """Return a tensor-parallel rank's part of sparse attention."""
    indexer, latent = model.indexer, model.latent
    assert indexer is not None and latent is not None, "the model has an indexer over its latents"
    return SparseLayer(model.num_heads // tp, latent.rope, latent.kv_rank, indexer.heads, indexer.dim, indexer.topk)


def mean_saved(work: Work, split: Split, attention: int) -> int:
    """Bytes that the mean layer keeps from forward to backward if a layer's attention keeps ``attention`` bytes."""
    model = work.model
    if model.linear is None:
        return attention
    state = local_tokens(work, split) * HALF * linear_layer(model, split.tp).saved_elements
    return round((1 - model.linear_share) * attention + model.linear_share * state)


def local_tokens(work: Work, split: Split) -> int:
    """Tokens of one micro batch on one rank of the context-parallel group."""
    return -(-work.seq_length // split.cp) * work.micro_batch


def held(work: Work, split: Split, with_experts: bool) -> Held:
    return _held(work.model, local_tokens(work, split), split, with_experts)


@lru_cache(maxsize=4096)
def _held(model: ModelShape, tokens: int, split: Split, with_experts: bool) -> Held:
    counts = _counts(model, with_experts)
    # Inputs of both norms and of the projections after them, low-rank inputs twice, and MLP inputs; split over tp.
    width = 4 * model.hidden + (2 * (model.latent.q_rank + model.latent.kv_rank) if model.latent else 0)
    router = routed = 0
    if with_experts:
        experts = _experts(model)
        width += model.matrices * experts.shared_ffn
        # Inputs and activations of a token's experts; all tensor-parallel ranks of an expert get the whole input.
        width += experts.topk * (model.hidden * split.etp + model.matrices * experts.ffn)
        router = 2 * FLOAT * experts.num  # logits and scores
        routed = counts.routed // (split.ep * split.etp)
    else:
        width += model.matrices * model.ffn
    return Held(counts.split // split.tp + counts.whole, routed, tokens * (HALF * width + router) // split.tp)


def forward(work: Work, split: Split, cluster: Cluster, with_experts: bool) -> Forward:
    return _forward(work.model, local_tokens(work, split), split, cluster, with_experts)


@lru_cache(maxsize=4096)
def _forward(model: ModelShape, tokens: int, split: Split, cluster: Cluster, with_experts: bool) -> Forward:
    compute = sum(
        cluster.product_seconds(flops, rows, columns)
        for flops, rows, columns in _products(model, tokens, split, with_experts)
    )
    # Each activation is written once and read once.
    compute += 2 * _held(model, tokens, split, with_experts).activations / cluster.memory_bandwidth
    row = tokens * model.hidden * HALF / split.tp  # bytes of the tokens that a rank holds between layers
    # A gather before and a scatter after attention, and the same for the dense MLP or the shared experts; latent
    # attention gathers the outputs of its low-rank projections.
    latent, scatter = model.latent, _exchange(row * split.tp, split.tp, 1, cluster)
    entry = (latent.q_rank or model.hidden) + latent.kv_rank + latent.rope if latent else model.hidden
    tensor = _exchange(tokens * entry * HALF, split.tp, 1, cluster) + scatter
    if not with_experts:
        return Forward(compute, tensor + 2 * scatter, 0.0)
    experts = _experts(model)
    tensor += 2 * scatter if experts.shared_ffn else 0
    tensor += 2 * _exchange(experts.topk * row * split.etp, split.etp, 1, cluster)
    return Forward(compute, tensor, 2 * _exchange(experts.topk * row, split.ep, split.etp, cluster))


def _products(model: ModelShape, tokens: int, split: Split, with_experts: bool) -> Iterator[tuple[float, float, float]]:
    """(FLOPs, rows, smaller other size) of a rank's matrix products: projections of attention, MLP, experts."""
    counts, experts = _counts(model, with_experts), model.experts
    shared = experts.shared_ffn if with_experts and experts else model.ffn
    mlp = model.matrices * model.hidden * shared
    narrow = (model.latent.q_rank or model.latent.kv_rank) if model.latent else model.hidden
    width = min(narrow, model.num_heads * model.dk / split.tp)
    yield 2 * tokens * (counts.active - counts.visited - mlp) / split.tp, tokens, width
    if mlp:
        yield 2 * tokens * mlp / split.tp, tokens, min(model.hidden, shared / split.tp)
    if with_experts and experts:
        visits = tokens / split.tp * split.ep * split.etp * experts.topk / experts.num  # of one expert
        yield 2 * tokens * counts.visited / split.tp, visits, min(model.hidden, experts.ffn / split.etp)


def _counts(model: ModelShape, with_experts: bool) -> LayerParameters:
    return model.expert_layer if with_experts else model.dense_layer


def _experts(model: ModelShape) -> Experts:
    assert model.experts is not None, "a layer with experts has a model with them"
    return model.experts


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
