"""A model's sizes from a Hugging Face config.json: LLaMA, Qwen, Mixtral, DeepSeek, Kimi and models with their keys."""

import json
import re
from pathlib import Path
from typing import Any

from mindspeed_cp.planner.models import Experts, Indexer, Latent, Linear, ModelShape

NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim", "kv_channels")
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Keys of layers with a state (Qwen3-Next), and of the indexer of sparse attention (DeepSeek-V3.2).
STATE = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)  # fmt: skip
INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
# Patterns of keys that indicate another architecture; keys that the planner reads or that change no size are excluded.
SUSPECT = re.compile(
    r"expert|moe|lora|mamba|ssm|^linear_|conv_|state_size|vision|audio|text_config|cross_attention|index_|^layer_types$"
)
KNOWN = {
    *LATENT[:2], *EXPERTS, "num_experts_per_tok", "num_experts_per_token", "moe_intermediate_size",
    "shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts", "moe_layer_freq",
    # Keys about routing and training of experts, on which no size depends.
    "output_router_logits", "moe_renormalize", "num_experts_per_group", "moe_aux_loss_coef", "moe_router_dtype",
    "moe_router_activation_func", "use_grouped_topk", "num_expert_group",
}  # fmt: skip


def hf_model(path: str) -> ModelShape:
    """The shape that a config.json describes, without layers for multi-token prediction.

    Raises:
        ValueError: the file is missing or not a JSON object, lacks a size, or has keys that the planner does not know.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf-config {path} cannot be read: {error}; give a model's config.json.") from error
    missing = [key for key in NEEDED if not isinstance(config, dict) or not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"--hf-config {path} has no {', '.join(missing)}; give a model's config.json.")
    for key in (*NEEDED, *OPTIONAL):
        value = config.get(key) or (1 if key in OPTIONAL else 0)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"--hf-config {path}: {key} {config[key]!r} must be a whole number above 0; give a model's config.json."
            )
    _refuse_unknown(path, config)
    layers, hidden, heads, ffn, vocab = (config[key] for key in NEEDED)
    if "no_bias" in config:  # Qwen's first generation counts both halves of its gated MLP
        ffn //= 2
    kv_heads, latent = config.get("num_key_value_heads") or heads, None
    dk = dv = config.get("head_dim") or config.get("kv_channels") or hidden // heads
    try:
        experts = _experts(config, layers, ffn)
        if config.get("kv_lora_rank"):
            q_rank, kv_rank, nope, rope, dv = (config[key] for key in LATENT)
            dk, kv_heads, latent = nope + rope, heads, Latent(q_rank or 0, kv_rank, rope)
        linear = _linear(config, layers)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--hf-config {path} is not complete ({error}); give a model's config.json.") from error
    tied = bool(config.get("tie_word_embeddings"))
    indexer = Indexer(*(config[key] for key in INDEXER)) if _has_indexer(config) else None
    sizes = layers, heads, kv_heads, dk, dv, hidden, ffn, vocab
    gate = bool(config.get("attn_output_gate", config.get("model_type") == "qwen3_next"))
    kinds = latent, experts
    return ModelShape(*sizes, _gated(config), tied, *kinds, linear=linear, indexer=indexer, output_gate=gate)


def _has_indexer(config: dict[str, Any]) -> bool:
    return all(config.get(key) for key in (*INDEXER, "kv_lora_rank"))


def _linear(config: dict[str, Any], layers: int) -> Linear | None:
    """Layers with a state, from the keys of Qwen3-Next or Kimi Linear."""
    if config.get("linear_attn_config"):
        kimi = config["linear_attn_config"]
        kinds, heads, size = kimi["kda_layers"], kimi["num_heads"], kimi["head_dim"]
        pattern = tuple(layer + 1 in kinds for layer in range(layers))
        return Linear(heads, heads, size, size, kimi["short_conv_kernel_size"], layers=pattern, gate_rank=size)
    if not config.get("linear_num_value_heads"):
        return None
    every = config.get("full_attention_interval") or 4
    types = config.get("layer_types") or ["linear_attention" if (n + 1) % every else "" for n in range(layers)]
    return Linear(*map(config.__getitem__, STATE), layers=tuple(kind == "linear_attention" for kind in types))


def _gated(config: dict[str, Any]) -> bool:
    """Whether the MLP has a gate: with SiLU, and in Gemma. Models with other activations (GPT-NeoX, StarCoder2) have
    none; Qwen's first generation has SiLU without naming it.
    """
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    return activation in ("silu", "swish") or str(config.get("model_type")).startswith("gemma")


def _refuse_unknown(path: str, config: dict[str, Any]) -> None:
    unknown = [key for key, value in config.items() if SUSPECT.search(key) and key not in KNOWN and value]
    kinds = {"full_attention", "linear_attention"} if config.get("linear_num_value_heads") else {"full_attention"}
    read = [] if set(config.get("layer_types") or []) - kinds else ["layer_types"]
    read += [*STATE, "linear_attn_config"] + list(INDEXER if _has_indexer(config) else ())
    unknown = [key for key in unknown if key not in read]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        unknown.append("sliding_window")
    if unknown:
        raise ValueError(
            f"--hf-config {path} has {', '.join(unknown)}, which the planner does not know; give --model with a model "
            "of similar sizes."
        )


def _experts(config: dict[str, Any], layers: int, ffn: int) -> Experts | None:
    """Experts from the keys of Mixtral, Qwen or DeepSeek."""
    num = next((config[key] for key in EXPERTS if config.get(key)), 0)
    if not num:
        return None
    width = config.get("moe_intermediate_size") or ffn
    num_shared = config.get("n_shared_experts") or config.get("num_shared_experts") or 0
    shared = config.get("shared_expert_intermediate_size") or num_shared * width
    frequency, only_mlp = config.get("moe_layer_freq") or 1, config.get("mlp_only_layers") or []
    step, dense = config.get("decoder_sparse_step") or 1, config.get("first_k_dense_replace") or 0
    pattern = tuple(
        layer >= dense and layer % frequency == 0 and layer not in only_mlp and (layer + 1) % step == 0
        for layer in range(layers)
    )
    topk = config.get("num_experts_per_token") or config["num_experts_per_tok"]
    return Experts(num, topk, width, shared, pattern)
