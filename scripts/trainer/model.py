"""The model, its data-parallel wrapper, the optimizer and the learning-rate schedule, all from megatron-core."""

import inspect

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from trainer.checks import has_uneven_shapes, of_same_name
from trainer.data import has_mask

# Megatron-core 0.12 identifies virtual stages by a global variable; later versions pass the stage.
_TAKES_STAGE = "vp_stage" in inspect.signature(GPTModel.__init__).parameters


class Norm:
    """torch's norm with support for sequence parallelism, which Megatron's own wrapper of it rejects."""

    def __new__(cls, config, hidden_size, eps=1e-5, **unused):
        kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            # finalize_model_grads sums the gradients of marked parameters over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def transformer_config(args):
    """The TransformerConfig for the flags."""
    same = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels normalization add_bias_linear "
        "add_qkv_bias attention_dropout hidden_dropout init_method_std params_dtype bf16 tensor_model_parallel_size "
        "pipeline_model_parallel_size context_parallel_size sequence_parallel recompute_granularity recompute_method "
        "recompute_num_layers calculate_per_token_loss"
    )
    fused = "gradient_accumulation masked_softmax apply_rope bias_activation bias_dropout"
    return TransformerConfig(
        **of_same_name(args, same),
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu if args.swiglu else F.gelu,
        window_size=None if has_mask(args) else args.window_size,
        pipeline_dtype=args.params_dtype,
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        # As with Megatron's own flags: with virtual stages on two ranks, a batch would mix up the two directions.
        overlap_p2p_comm=bool(args.num_virtual_stages_per_pipeline_rank),
        batch_p2p_comm=not args.num_virtual_stages_per_pipeline_rank,
        variable_seq_lengths=has_uneven_shapes(args),
        # Used only for mixtures of experts, but the default rejects variable lengths even without experts.
        moe_token_dispatcher_type="alltoall",
        persist_layer_norm=False,
        **{f"{name}_fusion": False for name in fused.split()},
    )


def _block(config, stage, causal):
    """The layers of one pipeline stage, with the norm above instead of Megatron's."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if not causal:
        layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    count = get_num_layers_to_build(config, **({"vp_stage": stage} if _TAKES_STAGE else {}))
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


def build_model(args):
    """List of model chunks, one per virtual stage of this pipeline rank, wrapped for data parallelism."""
    config, chunks = transformer_config(args), []
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    for stage in range(args.num_virtual_stages_per_pipeline_rank or 1):
        module = _gpt(args, config, stage if args.num_virtual_stages_per_pipeline_rank else None)
        module.cuda(torch.cuda.current_device())
        if args.bf16:
            module = Float16Module(config, module)
        chunks.append(
            DistributedDataParallel(config=config, ddp_config=ddp, module=module, disable_bucketing=stage > 0)
        )
    for chunk in chunks:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def _gpt(args, config, stage):
    if stage is not None and not _TAKES_STAGE:
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
    virtual = {"vp_stage": stage} if _TAKES_STAGE else {}
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return GPTModel(
        config=config,
        transformer_layer_spec=_block(config, stage, args.cp_attention_mask_type != "full"),
        vocab_size=(args.vocab_size + multiple - 1) // multiple * multiple,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **virtual),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **virtual),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        **of_same_name(args, "position_embedding_type rotary_base rotary_percent"),
        **virtual,
    )


def build_optimizer(args, chunks):
    """(MegatronOptimizer, OptimizerParamScheduler)"""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            **of_same_name(args, "lr min_lr weight_decay adam_beta1 adam_beta2 clip_grad bf16 params_dtype"),
            use_distributed_optimizer=args.use_distributed_optimizer,
        ),
        chunks,
    )
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters or args.train_iters,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
