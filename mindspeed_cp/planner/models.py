"""What the planner knows about a model: its sizes, its parameters, and the table of models by name (models.txt)."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

TABLE = Path(__file__).with_name("models.txt")


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention: queries, and keys with values, come from low-rank projections.

    Args:
        q_rank, kv_rank: rank of the queries' projection (0: a single full projection), and of keys and values.
        rope: rotated elements of a head's query and key; all heads share those of the key.
    """

    q_rank: int
    kv_rank: int
    rope: int


@dataclass(frozen=True)
class Experts:
    """Experts instead of the MLP in some layers.

    Args:
        num, topk: number of experts, and of those that a token visits.
        ffn, shared_ffn: width of one expert, and of all shared experts together, which every token visits.
        layers: for every layer, whether it has experts.
        bias: whether they have biases.
    """

    num: int
    topk: int
    ffn: int
    shared_ffn: int
    layers: tuple[bool, ...]
    bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= self.num:
            raise ValueError(f"{self.topk} experts for a token must be at least 1 and at most all {self.num}.")


@dataclass(frozen=True)
class Linear:
    """Layers with a state in place of attention: gated delta nets, or Kimi's delta attention.

    Args:
        keys, values: number of heads. key_dim, value_dim: their sizes. width: width of the convolution.
        layers: for every layer, whether it has a state.
        gate_rank: rank of the projections to the gate and to a decay per key channel; 0: a single full projection to
            the gate, and one decay per value head.
    """

    keys: int
    values: int
    key_dim: int
    value_dim: int
    width: int
    gate_rank: int = field(default=0, kw_only=True)
    layers: tuple[bool, ...] = field(kw_only=True)

    @property
    def share(self) -> float:
        return sum(self.layers) / len(self.layers)

    @property
    def decays(self) -> int:
        return self.key_dim if self.gate_rank else 1

    def parameters(self, hidden: int) -> tuple[int, int]:
        """Return (parameters that tensor parallelism splits, other parameters) of such a layer."""
        keys, values = self.keys * self.key_dim, self.values * self.value_dim
        own = (2 * keys + values) * (hidden + self.width) + self.values * (hidden + 1 + self.decays) + values * hidden
        if not self.gate_rank:
            return own + hidden * (values + self.values), self.value_dim
        return own + self.gate_rank * (keys + values), 2 * hidden * self.gate_rank + self.value_dim


@dataclass(frozen=True)
class Indexer:
    """Indexer that selects the keys of latent attention (DSA) in every layer: heads, their size, keys per query."""

    heads: int
    dim: int
    topk: int

    def parameters(self, hidden: int, q_rank: int) -> int:
        """Number of parameters, all of which are on every tensor-parallel rank."""
        return q_rank * self.heads * self.dim + hidden * (self.dim + self.heads) + 2 * self.dim


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer.

    Args:
        split: parameters that tensor parallelism splits. whole: those that every rank holds: norms, router, low-rank
            projections.
        routed: parameters of all experts except shared ones. visited: parameters of those that a token visits.
    """

    split: int
    whole: int
    routed: int = 0
    visited: int = 0

    @property
    def total(self) -> int:
        return self.split + self.whole + self.routed

    @property
    def active(self) -> int:
        return self.split + self.whole + self.visited


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one model.

    Args:
        num_heads, num_kv_heads, dk, dv: query heads, KV heads, and head dimensions of key and value in attention;
            latent attention has as many KV heads as query heads.
        hidden, ffn: hidden size, and width of the dense MLP.
        vocab: vocabulary size.
        gated: whether the MLP has a gate (SwiGLU), with three matrices instead of two.
        tied: whether embedding and output share their weights.
        learned_positions: rows of a table of positions, whole on every tensor-parallel rank of the first stage; not
            counted in ``parameters``.
        window, windowed_share: tokens that a query sees in windowed layers, and the fraction of these layers.
        output_gate: whether attention has an output gate of the same width as its output.

    Layers of several kinds are counted as their mean.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    dk: int
    dv: int
    hidden: int
    ffn: int
    vocab: int
    gated: bool
    tied: bool
    latent: Latent | None = None
    experts: Experts | None = None
    learned_positions: bool = False
    window: int = 0
    windowed_share: float = 0.0
    linear: Linear | None = None
    indexer: Indexer | None = None
    output_gate: bool = False

    @property
    def limits(self) -> tuple[int, float]:
        """(tokens that a query sees in layers with a limit, fraction of these layers)."""
        return (self.indexer.topk, 1.0) if self.indexer else (self.window, self.windowed_share)

    @property
    def kept_share(self) -> float:
        """Fraction of layers whose attention can be kept across recomputation: those with dense attention."""
        return 0.0 if self.indexer else 1 - self.linear_share

    @property
    def linear_share(self) -> float:
        """Fraction of layers with a state instead of attention."""
        return self.linear.share if self.linear else 0.0

    @property
    def matrices(self) -> int:
        """Number of matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def split_widths(self) -> tuple[int, ...]:
        """Widths of the MLPs that tensor parallelism splits: of layers without experts, and of shared experts."""
        dense = self.experts is None or not all(self.experts.layers)
        shared = self.experts.shared_ffn if self.experts else 0
        return ((self.ffn,) if dense else ()) + ((shared,) if shared else ())

    @cached_property
    def dense_layer(self) -> LayerParameters:
        """A layer without experts: attention's projections, the MLP and the norms."""
        split, whole = self._mixer_parameters()
        return LayerParameters(split + self.matrices * self.hidden * self.ffn, whole)

    @cached_property
    def expert_layer(self) -> LayerParameters:
        """A layer with experts in place of the MLP."""
        assert self.experts is not None
        split, whole = self._mixer_parameters()
        one = self.matrices * self.hidden * self.experts.ffn
        shared = self.matrices * self.hidden * self.experts.shared_ffn
        router = self.hidden * self.experts.num
        return LayerParameters(split + shared, whole + router, self.experts.num * one, self.experts.topk * one)

    def layer(self, with_experts: bool) -> LayerParameters:
        return self.expert_layer if with_experts else self.dense_layer

    def _mixer_parameters(self) -> tuple[int, int]:
        """Return (parameters that tensor parallelism splits, other parameters including both norms) of attention, or of
        the mean of attention and layers with a state.
        """
        split, whole = self._attention_parameters()
        if self.indexer and self.latent:
            whole += self.indexer.parameters(self.hidden, self.latent.q_rank or self.hidden)
        if self.linear:
            others = self.linear.parameters(self.hidden)
            split, whole = (
                round((1 - self.linear_share) * one + self.linear_share * other)
                for one, other in ((split, others[0]), (whole, others[1] + 2 * self.hidden))
            )
        return split, whole

    def _attention_parameters(self) -> tuple[int, int]:
        latent, norms = self.latent, 2 * self.hidden
        out = (2 if self.output_gate else 1) * self.num_heads * self.dv * self.hidden
        if latent is None:
            return out + self.hidden * (self.num_heads * self.dk + self.num_kv_heads * (self.dk + self.dv)), norms
        query = (latent.q_rank or self.hidden) * self.num_heads * self.dk
        key_value = latent.kv_rank * self.num_heads * (self.dk - latent.rope + self.dv)
        down = self.hidden * (latent.q_rank + latent.kv_rank + latent.rope) + latent.q_rank + latent.kv_rank
        return out + query + key_value, norms + down

    def stage(self, number: int, of: int, ends: bool = False) -> tuple[int, int]:
        """Number of layers (without, with) experts in pipeline stage ``number`` of ``of``; the last may be shorter.

        Args:
            ends: whether embedding and output count as one layer each, in the first and the last stage.
        """
        most, shift = -(-(self.num_layers + 2 * ends) // of), int(ends)
        layers = range(self.num_layers)[max(number * most - shift, 0) : (number + 1) * most - shift]
        with_experts = sum(self.experts.layers[layer] for layer in layers) if self.experts else 0
        return len(layers) - with_experts, with_experts

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self._sum("total")

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token visits."""
        return self._sum("active")

    def _sum(self, count: str) -> int:
        kinds = enumerate(self.stage(0, 1))
        layers = sum(number * getattr(self.layer(bool(kind)), count) for kind, number in kinds if number)
        return int(layers) + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden


def _row(line: str) -> tuple[str, ModelShape]:
    name, *words = line.split()
    layers, hidden, ffn, heads, kv_heads, vocab = map(int, words[:6])
    more = {key: int(value) for key, _, value in (word.partition("=") for word in words[6:]) if value}
    latent = Latent(more["q_rank"], more["kv_rank"], more["rope"]) if "kv_rank" in more else None
    dk = more["nope"] + more["rope"] if latent else more.get("dim", hidden // heads)
    experts = None
    if "experts" in more:
        pattern = tuple(layer >= more.get("dense", 0) for layer in range(layers))
        experts = Experts(more["experts"], more["topk"], more["expert_ffn"], more.get("shared_ffn", 0), pattern)
    gated, tied, dv = "gated" in words, "untied" not in words, more.get("dv", dk)
    # In each group of ``every`` layers, the last has full attention and the others a window.
    every = more.get("every", 1)
    share = sum((layer + 1) % every > 0 for layer in range(layers)) / layers
    linear = None
    if "linear_values" in more:
        # The last layer of each group of ``every`` layers, and the last of the model, has attention.
        kinds = tuple((layer + 1) % every > 0 and layer + 1 < layers for layer in range(layers))
        names = ("linear_keys", "linear_values", "linear_key_dim", "linear_value_dim", "conv")
        linear = Linear(*map(more.__getitem__, names), layers=kinds, gate_rank=more.get("gate_rank", 0))
    indexer = Indexer(more["index_heads"], more["index_dim"], more["index_topk"]) if "index_heads" in more else None
    sizes, window = (layers, heads, kv_heads, dk, dv, hidden, ffn, vocab), more.get("window", 0) if share else 0
    windows = window, share if window else 0.0
    others = latent, experts, "learned" in words, *windows, linear, indexer, "gate" in words
    return name, ModelShape(*sizes, gated, tied, *others)


MODELS = dict(_row(line) for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))


def named_model(name: str) -> ModelShape:
    """The shape of a named model.

    Raises:
        ValueError: the name is not in the table.
    """
    if name not in MODELS:
        raise ValueError(
            f"--model {name} is not known; choose one of {', '.join(MODELS)}, or give --hf-config, or Megatron's flags."
        )
    return MODELS[name]
