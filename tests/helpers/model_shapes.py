"""Shapes of published models, as small as possible: name -> arguments of Case."""

import torch.nn.functional as functional

LLAMA = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "num_query_groups": 2,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.0,
    "add_bias_linear": False,
}
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
    "add_bias_linear": False,
}
SINKS = {"softmax_type": "learnable"}
WINDOWS = {"window_size": (6, 0), "window_attn_skip_freq": 2}
DOCUMENTS = (0, 5, 6, 23)
PARTIAL = {"rotary_percent": 0.5}
# Three positions for each token: time, height and width; 8 channels of a head turn in pairs.
MULTIMODAL = {"mrope_section": [2, 1, 1]}
MROPE = {"position_embedding_type": "mrope"}
TIED = {"share_embeddings_and_output_weights": True}
MTP1 = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.5}
MTP3 = {"mtp_num_layers": 3, "mtp_loss_scaling_factor": 0.5}
NORMED = {"qk_layernorm": True}


def _shape(settings, since=(0, 12), **more):
    return {"settings": settings, "since": since, **more}


SHAPES = {
    "Llama 3": _shape(LLAMA, model={"rope_scaling": True}),
    "Llama 3, tied": _shape(LLAMA, model=TIED),
    "Llama 4": _shape(
        LLAMA
        | EXPERTS
        | {
            "no_rope_freq": 2,
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
            "moe_shared_expert_intermediate_size": 16,
            "qk_l2_norm": True,
        },
        since=(0, 14),
        layer={"qk_l2_norm": True},
    ),
    "gpt-oss": _shape(EXPERTS | SINKS | WINDOWS | {"num_query_groups": 2, "kv_channels": 12}, since=(0, 15)),
    "gpt-oss, packed": _shape(EXPERTS | SINKS | WINDOWS, since=(0, 16), documents=DOCUMENTS),
    "Gemma 3": _shape(
        LLAMA
        | WINDOWS
        | NORMED
        | {"activation_func": functional.gelu, "window_attn_skip_freq": [1, 0], "kv_channels": 16},
        since=(0, 15),
        layer=NORMED,
        model=TIED,
    ),
    "Gemma 3, packed": _shape(LLAMA | WINDOWS | NORMED, since=(0, 16), layer=NORMED, model=TIED, documents=DOCUMENTS),
    "GLM": _shape(LLAMA | {"add_qkv_bias": True, "rotary_interleaved": True}, model=PARTIAL),
    "Qwen 2": _shape(LLAMA | {"add_qkv_bias": True}),
    "Qwen 3": _shape(LLAMA | NORMED | {"kv_channels": 12}, layer=NORMED),
    "Qwen 3, experts": _shape(LLAMA | EXPERTS | NORMED, layer=NORMED),
    "gated attention": _shape(
        LLAMA | NORMED | {"attention_output_gate": True}, since=(0, 16), layer=NORMED, model=PARTIAL
    ),
    "DeepSeek-V2 Lite": _shape(
        LATENT | EXPERTS | {"moe_shared_expert_intermediate_size": 16, "moe_layer_freq": [0, 1]}
    ),
    "latent attention, normed": _shape(LATENT | NORMED | {"q_lora_rank": 16}, layer=NORMED),
    "latent attention, wide values": _shape(LATENT | {"v_head_dim": 12}),
    "latent attention, packed, yarn": _shape(
        LATENT | {"rope_type": "yarn", "rotary_scaling_factor": 4}, since=(0, 16), documents=DOCUMENTS
    ),
    "multi-token prediction, three deep": _shape(LLAMA | MTP3),
    "multi-token prediction, three deep, packed": _shape(LLAMA | MTP3, since=(0, 16), documents=DOCUMENTS),
    "multi-token prediction, one target": _shape(MTP3, targets=1),
    "multi-token prediction, one target, per-token loss": _shape(MTP3 | {"calculate_per_token_loss": True}, targets=1),
    "one key for all": _shape(LLAMA | {"num_query_groups": 1}),
    "layer scaling": _shape({"apply_query_key_layer_scaling": True}),
    "learned positions": _shape({}, model={"position_embedding_type": "learned_absolute"}),
    "no positions": _shape(LLAMA, model={"position_embedding_type": "none"}),
    "Mixtral, packed": _shape(LLAMA | EXPERTS, since=(0, 16), documents=DOCUMENTS),
    "Qwen 2 VL": _shape(LLAMA | MULTIMODAL | {"add_qkv_bias": True}, model=MROPE, steps=2),
    "Qwen 2 VL, packed": _shape(LLAMA | MULTIMODAL, since=(0, 16), model=MROPE, documents=DOCUMENTS),
    "Qwen 3 VL, experts, multi-token prediction": _shape(
        LLAMA | EXPERTS | NORMED | MULTIMODAL | MTP1, model=MROPE, layer=NORMED
    ),
    "residuals in float32": _shape(LLAMA | {"fp32_residual_connection": True}),
}
