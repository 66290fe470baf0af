"""Models as the planner knows them: by name, by a Hugging Face config.json."""

import json

import pytest

from mindspeed_cp.planner.hugging_face import hf_model
from mindspeed_cp.planner.models import MODELS, Experts

# name -> (parameters, active ones) in 1e9, as the models' papers and cards have them
KNOWN = {
    "llama2-7b": (6.74, 6.74),
    "llama2-70b": (68.98, 68.98),
    "gpt3-175b": (174.6, 174.6),
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen2-57b-a14b": (57.4, 14.2),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "deepseek-v2": (236, 21.4),
    "deepseek-v3": (671, 37.5),
    "deepseek-v3.2": (672, 38.4),
    "qwen3-next-80b-a3b": (79.7, 3.87),
    "kimi-linear-48b-a3b": (49.1, 3.48),
    "llama3-8b": (8.03, 8.03),
    "llama3.1-70b": (70.6, 70.6),
    "llama3.1-405b": (405.9, 405.9),
    "llama3.2-1b": (1.24, 1.24),
    "llama3.2-3b": (3.21, 3.21),
    "qwen2.5-7b": (7.62, 7.62),
    "qwen2.5-72b": (72.7, 72.7),
    "qwen3-8b": (8.19, 8.19),
    "qwen3-32b": (32.8, 32.8),
    "mistral-7b": (7.25, 7.25),
    "mistral-small-24b": (23.6, 23.6),
    "mistral-large-123b": (122.6, 122.6),
    "gemma3-12b": (11.8, 11.8),
    "gemma3-27b": (27.0, 27.0),
    "gpt-oss-20b": (20.9, 4.2),
    "gpt-oss-120b": (116.8, 5.7),
    "glm-4.5": (353, 33.5),
    "glm-4.5-air": (106.9, 13.4),
    "pangu-ultra-135b": (134, 134),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_that_the_models_are_known_by(name):
    total, active = KNOWN[name]
    assert MODELS[name].parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert MODELS[name].active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_deepseek_counts_its_active_parameters_without_the_embeddings():
    model = MODELS["deepseek-v3"]
    assert (model.active_parameters - model.vocab * model.hidden) / 1e9 == pytest.approx(36.6, abs=0.05)


def test_windows_are_counted():
    gemma, oss = MODELS["gemma3-27b"], MODELS["gpt-oss-120b"]
    assert (gemma.window, gemma.windowed_share) == (1024, pytest.approx(52 / 62))  # every sixth layer sees everything
    assert (oss.window, oss.windowed_share) == (128, 0.5) and MODELS["llama3-8b"].window == 0


DENSE = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "tie_word_embeddings": False}
HF = {
    "llama2-70b": {
        "hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "qwen-7b": {
        **DENSE, "kv_channels": 128, "intermediate_size": 22016, "vocab_size": 151936, "no_bias": True,
    },
    "qwen1_5-72b": {
        "hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 64,
        "intermediate_size": 24576, "vocab_size": 152064, "sliding_window": 32768, "use_sliding_window": False,
    },
    "mixtral-8x7b": {
        **DENSE, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "output_router_logits": True, "sliding_window": None,
    },
    "qwen1.5-moe-a2.7b": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "intermediate_size": 5632, "vocab_size": 151936, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "intermediate_size": 6144, "vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    "deepseek-v2-lite": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "intermediate_size": 10944, "vocab_size": 102400, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    },
    "deepseek-v3": {
        "hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "intermediate_size": 18432, "vocab_size": 129280, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "ep_size": 1,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
    },
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 48,
        "num_key_value_heads": 2, "intermediate_size": 5120, "vocab_size": 151936, "head_dim": 256,
        "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 12,
    },
    "kimi-linear-48b-a3b": {
        "model_type": "kimi_linear", "hidden_size": 2304, "num_attention_heads": 32, "num_hidden_layers": 27,
        "num_key_value_heads": 32, "intermediate_size": 9216, "vocab_size": 163840, "head_dim": 72, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mla_use_nope": True,
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
            "kda_layers": [n for n in range(1, 27) if n % 4], "short_conv_kernel_size": 4,
        },
        "num_experts": 256, "num_experts_per_token": 8, "moe_intermediate_size": 1024, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_router_activation_func": "sigmoid",
    },
    "deepseek-v3.2": {
        "hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "intermediate_size": 18432, "vocab_size": 129280, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "moe_layer_freq": 1, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    },
}  # fmt: skip


def written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", HF)
def test_a_config_of_hugging_face_is_the_named_model(name, tmp_path):
    assert hf_model(written(tmp_path, HF[name])) == MODELS[name]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 must be a whole number"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads .8. must be a whole number"),
        ({"mamba_d_state": 128, "vision_config": {}}, "has mamba_d_state, which the planner does not know"),
        ({"index_topk": 2048}, "has index_topk, "),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has layer_types, "),
        ({"sliding_window": 4096}, "has sliding_window, "),
        ({"kv_lora_rank": 512}, "is not complete .'q_lora_rank'."),
        ({"num_local_experts": 8}, "is not complete .'num_experts_per_tok'."),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "9 experts for a token must be .* at most all 8"),
    ],
)
def test_what_a_config_has_that_is_not_understood_is_named(more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        hf_model(written(tmp_path, {**HF["llama2-70b"], **more}))
    full = written(tmp_path, {**HF["llama2-70b"], "layer_types": ["full_attention"] * 80})
    assert hf_model(full) == MODELS["llama2-70b"]


def test_layers_without_experts_are_those_of_the_config(tmp_path):
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    experts = hf_model(written(tmp_path, {**HF["qwen3-30b-a3b"], **changes})).experts
    assert experts == Experts(128, 8, 768, 0, (False, True, False, False, False, True))
    assert MODELS["deepseek-v3"].stage(0, 1) == (3, 58)


@pytest.mark.parametrize(
    ("more", "gated"),
    [
        ({"hidden_act": "gelu", "model_type": "gpt_neox"}, False),
        ({"hidden_act": "gelu_pytorch_tanh", "model_type": "starcoder2"}, False),
        ({"hidden_act": "gelu_pytorch_tanh", "model_type": "gemma"}, True),
        ({"hidden_act": "silu", "model_type": "mistral"}, True),
    ],
)
def test_models_without_a_gate_have_two_matrices_in_the_mlp(tmp_path, more, gated):
    assert hf_model(written(tmp_path, {**HF["llama2-70b"], **more})).gated == gated
