"""What the planner must know of a model: the sizes of attention, by name or from a Hugging Face config.json."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelShape:
    """Attention of one model: layers, query heads, KV heads, and the head sizes of key and value."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    dk: int
    dv: int


def _shape(layers: int, hidden: int, heads: int, kv_heads: int) -> ModelShape:
    return ModelShape(layers, heads, kv_heads, hidden // heads, hidden // heads)


# family-size -> shape; the sizes of scripts/launch (tests/test_planner.py compares them).
MODELS = {
    "llama2-7b": _shape(32, 4096, 32, 32),
    "llama2-13b": _shape(40, 5120, 40, 40),
    "llama2-70b": _shape(80, 8192, 64, 8),
    "qwen-7b": _shape(32, 4096, 32, 32),
    "qwen-14b": _shape(40, 5120, 40, 40),
    "qwen-72b": _shape(80, 8192, 64, 64),
    "qwen1_5-7b": _shape(32, 4096, 32, 32),
    "qwen1_5-14b": _shape(40, 5120, 40, 40),
    "qwen1_5-72b": _shape(80, 8192, 64, 64),
    "gpt3-125m": _shape(12, 768, 12, 12),
    "gpt3-350m": _shape(24, 1024, 16, 16),
    "gpt3-1.3b": _shape(24, 2048, 16, 16),
    "gpt3-2.7b": _shape(32, 2560, 32, 32),
    "gpt3-6.7b": _shape(32, 4096, 32, 32),
    "gpt3-13b": _shape(40, 5120, 40, 40),
    "gpt3-175b": _shape(96, 12288, 96, 96),
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
        ValueError: the file is not there, is no JSON object, lacks a size, or uses multi-latent attention.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf-config {path} cannot be read: {error}; give a model's config.json.") from error
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    missing = [key for key in needed if not isinstance(config, dict) or not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"--hf-config {path} has no {', '.join(missing)}; give a model's config.json.")
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"--hf-config {path} has kv_lora_rank {config['kv_lora_rank']}: the planner does not read multi-latent "
            "attention; give --model with a model of similar sizes."
        )
    layers, hidden, heads = (config[key] for key in needed)
    dim = config.get("head_dim") or config.get("kv_channels") or hidden // heads
    return ModelShape(layers, heads, config.get("num_key_value_heads") or heads, dim, dim)
