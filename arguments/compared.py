"""The settings that must be equal on all ranks: those that determine model, training and communication.

Ranks may differ in everything else: rank and local rank, paths, logging, profiling, seeds that Megatron derives itself.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_cp.arguments.border import AdaptorSettings
from mindspeed_cp.arguments.declared import declared
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.setting import declarations
from mindspeed_cp.settings.training_setup import TrainingSetup

MODEL = """
num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
group_query_attention kv_channels seq_length decoder_seq_length max_position_embeddings position_embedding_type
rotary_base rotary_percent rotary_interleaved rotary_scaling_factor use_rope_scaling normalization norm_epsilon swiglu
squared_relu add_bias_linear add_qkv_bias qk_layernorm untie_embeddings_and_output_weights vocab_size
padded_vocab_size make_vocab_size_divisible_by window_size window_attn_skip_freq softmax_type multi_latent_attention
q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim num_experts moe_layer_freq moe_router_topk
moe_ffn_hidden_size moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_expert_capacity_factor
moe_token_dispatcher_type moe_router_score_function moe_shared_expert_intermediate_size mtp_num_layers
mtp_loss_scaling_factor hybrid_override_pattern is_hybrid_model transformer_impl use_legacy_models
attention_softmax_in_fp32 apply_query_key_layer_scaling init_method_std
""".split()
TRAINING = """
micro_batch_size global_batch_size rampup_batch_size train_iters train_samples lr min_lr lr_decay_style lr_decay_iters
lr_decay_samples lr_warmup_iters lr_warmup_fraction lr_warmup_samples lr_wsd_decay_style lr_wsd_decay_iters optimizer
weight_decay start_weight_decay end_weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum seed
data_parallel_random_init bf16 fp16 fp8 params_dtype loss_scale initial_loss_scale accumulate_allreduce_grads_in_fp32
attention_dropout hidden_dropout recompute_granularity recompute_method recompute_num_layers recompute_modules
recompute_activations calculate_per_token_loss reset_position_ids reset_attention_mask eod_mask_loss split
create_attention_mask_in_dataloader variable_seq_lengths eval_iters eval_interval save_interval exit_interval
tokenizer_type mock_data dataloader_type check_for_nan_in_loss_and_grad deterministic_mode
""".split()
PARALLEL = """
world_size tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage context_parallel_size cp_comm_type
hierarchical_context_parallel_sizes expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
use_distributed_optimizer overlap_grad_reduce overlap_param_gather use_tp_pp_dp_mapping distributed_backend
ckpt_format use_dist_ckpt num_distributed_optimizer_instances tp_comm_overlap
""".split()


def compared_names() -> tuple[str, ...]:
    """The compared names, as attributes of a namespace."""
    ours = (each.dest for each in declared() if each.agree)
    return tuple(dict.fromkeys((*PARALLEL, *ours, *MODEL, *TRAINING)))


def compared_arguments(args: Any) -> dict[str, str]:
    """flag -> value of all settings in the namespace or mapping ``args`` that must be equal on all ranks."""
    values = args if isinstance(args, Mapping) else vars(args)
    # With --cp-log the ranks communicate at the end of every interval.
    names = (*compared_names(), "log_interval") if values.get("cp_log") else compared_names()
    return {f"--{name.replace('_', '-')}": _text(values[name]) for name in names if name in values}


def compared_config(
    config: ContextParallelConfig, setup: TrainingSetup | None = None, **keywords: Any
) -> dict[str, str]:
    """flag -> value of a configuration, its setup and the further ``keywords`` of ``megatron_adaptor.configure``; a
    setting without a flag is listed by its name.
    """
    sources = (config, setup, AdaptorSettings(**keywords) if keywords else None)
    return {
        each.label: _text(getattr(source, each.name))
        for source in sources
        if source is not None
        for each in declarations(type(source))
        if each.agree
    }


def _text(value: Any) -> str:
    if callable(value):
        return (
            f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__qualname__
        )
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
