"""What the planner must know of a model: its sizes, by name or from a Hugging Face config.json."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one model.

    Args:
        num_heads, num_kv_heads, dk, dv: query heads, KV heads, and the head sizes of key and value.
        hidden, ffn: widths; ffn of one expert or of the dense MLP.
        vocab: entries of the vocabulary.
        gated: the MLP has a gate (SwiGLU), three matrices instead of two.
        tied: embeddings and output share their weights.
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

    @property
    def layer_parameters(self) -> int:
        """Of one layer: attention's four projections, the MLP and two norms."""
        attention = self.hidden * (self.num_heads * (self.dk + self.dv) + self.num_kv_heads * (self.dk + self.dv))
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return (
            self.num_layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden
        )


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    dim = hidden // heads
    return ModelShape(layers, heads, kv_heads, dim, dim, hidden, ffn, vocab, gated=True, tied=False)


def _gpt(layers: int, hidden: int, ffn: int, heads: int) -> ModelShape:
    dim = hidden // heads
    return ModelShape(layers, heads, heads, dim, dim, hidden, ffn, 50257, gated=False, tied=True)


# family-size -> shape; the sizes of scripts/launch (tests/test_planner.py compares them).
MODELS = {
    "llama2-7b": _llama(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": _llama(40, 5120, 13824, 40, 40, 32000),
    "llama2-70b": _llama(80, 8192, 28672, 64, 8, 32000),
    "qwen-7b": _llama(32, 4096, 11008, 32, 32, 151936),
    "qwen-14b": _llama(40, 5120, 13696, 40, 40, 152064),
    "qwen-72b": _llama(80, 8192, 24576, 64, 64, 152064),
    "qwen1_5-7b": _llama(32, 4096, 11008, 32, 32, 151936),
    "qwen1_5-14b": _llama(40, 5120, 13696, 40, 40, 152064),
    "qwen1_5-72b": _llama(80, 8192, 24576, 64, 64, 152064),
    "gpt3-125m": _gpt(12, 768, 3072, 12),
    "gpt3-350m": _gpt(24, 1024, 4096, 16),
    "gpt3-1.3b": _gpt(24, 2048, 8192, 16),
    "gpt3-2.7b": _gpt(32, 2560, 10240, 32),
    "gpt3-6.7b": _gpt(32, 4096, 16384, 32),
    "gpt3-13b": _gpt(40, 5120, 20480, 40),
    "gpt3-175b": _gpt(96, 12288, 49152, 96),
}


def named_model(name: str) -> ModelShape:
    """The shape of a named model.

    Raises:
        ValueError: the name is not in the table.
    """
    if name not in MODELS:
        raise ValueError(f"--model {name} is not known; choose one of {', '.join(MODELS)}, or give --hf-config.")
    return MODELS[name]


def hf_model(path: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes (LLaMA, Qwen, Qwen1.5 and others with the same names).

    Raises:
        ValueError: the file is not there, is no JSON object, lacks a size, or has multi-latent attention or experts.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf-config {path} cannot be read: {error}; give a model's config.json.") from error
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [key for key in needed if not isinstance(config, dict) or not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"--hf-config {path} has no {', '.join(missing)}; give a model's config.json.")
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"--hf-config {path} has kv_lora_rank {config['kv_lora_rank']}: the planner does not read multi-latent "
            "attention; give --model with a model of similar sizes."
        )
    if config.get("num_experts") or config.get("num_local_experts"):
        raise ValueError(
            f"--hf-config {path} has experts, which the planner does not count; give --model with a dense model of "
            "similar sizes."
        )
    layers, hidden, heads, ffn, vocab = (config[key] for key in needed)
    dim = config.get("head_dim") or config.get("kv_channels") or hidden // heads
    if "no_bias" in config:  # Qwen's first generation counts both halves of its gated MLP
        ffn //= 2
    kv_heads, tied = config.get("num_key_value_heads") or heads, bool(config.get("tie_word_embeddings"))
    return ModelShape(layers, heads, kv_heads, dim, dim, hidden, ffn, vocab, gated=True, tied=tied)
