"""Keys of MindFormers' YAML files that are not read here and that are not misspelt keys.

Collected from the files of its releases 0.3 to 1.8: all keys of the first level and of the sections about parallelism;
of a model's configuration, only the keys that resemble those read here.
"""

_TOP = """
adapter_id auto_trans_ckpt auto_tune autotune_per_step balanced_load callbacks check_for_nan_in_loss_and_grad checkpoint
context data_simplification data_skip_steps dataset_config distribute_parallel_config do_eval eval_callbacks
eval_dataset eval_dataset_task eval_epoch_interval eval_step_interval exclude_cann_cpu extra_config filepath_prefix
generation generation_config grouped_lr_schedule ignore_data_skip infer infer_precision_sync init_start_profile
input_data kernel_launch_group layer_decay layer_scale load_checkpoint load_ckpt_async load_ckpt_format lora_config
lr_scale lr_scale_factor lr_schedule lr_scheduler metric micro_batch_interleave_num model_config moe_config monitor
monitor_config mstx only_save_strategy optimizer optimizer_config output_dir parallelism postprocess_use_numpy
predict_batch_size pretrained_model_dir print_separate_loss processor profile profile_communication profile_level
profile_memory profile_output profile_pipeline profile_rank_ids profile_start_step profile_stop_step profiler
profiler_level push_to_hub recompute recompute_config remote_save_url remove_redundancy resume_by_last_timestamp_ckpt
resume_training run_mode runner_config runner_wrapper save_file seed src_strategy_path_or_dir swap_config top_k
train_dataset train_dataset_task train_precision_sync trainer training training_config transform_process_num
use_checkpoint_health_monitor use_graceful_exit use_legacy use_legacy_format use_parallel with_stack
"""
_PARALLEL_CONFIG = """
auto_parallel cp_comm_type expert_model_parallel expert_model_parallel_size expert_parallel gradient_aggregation_group
hierarchical_context_parallel_sizes mem_coeff micro_batch_interleave_num micro_batch_num model_customize_staged offset
optimizer_shard overlap_grad_reduce pipeline_dtype pp_interleave_num recompute recv_dtype reduction select_recompute
seq_split_num virtual_pipeline_model_parallel_size vocab_emb_dp zero_level
"""
_PARALLEL = """
auto_parallel_search_mode auto_pipeline dataset_strategy enable_parallel_optimizer full_batch gradients_mean
loss_repeated_mean optimizer_weight_shard_size parallel_mode parallel_optimizer_config pipeline_config
pipeline_interleave search_mode strategy_ckpt_config strategy_ckpt_load_file strategy_ckpt_save_file
"""
_MODEL_CONFIG = """
use_attention_mask use_eod_attn_mask_compression use_flash_attention_v2 use_incre_flash_attention
use_prompt_flash_attention use_ring_attention
"""
KNOWN = {
    f"{section}{name}"
    for section, names in {
        "": _TOP,
        "parallel_config.": _PARALLEL_CONFIG,
        "parallel.": _PARALLEL,
        "model.": "arch",
        "model.model_config.": _MODEL_CONFIG,
    }.items()
    for name in names.split()
}
