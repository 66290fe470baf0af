"""Three steps of a tiny GPT with megatron-core and mindspeed_cp, in every mode that Megatron trains in."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_batch_on_this_cp_rank

from mindspeed_cp import ContextParallelConfig, TrainingSetup

LENGTH, HEADS, HIDDEN, VOCABULARY = 32, 4, 32, 64


@dataclass(frozen=True)
class Options:
    bf16: bool = False
    distributed_optimizer: bool = False
    sequence_parallel: bool = False
    recompute: str = ""
    fused_update: bool = False
    layers: int = 2
    cp_options: tuple = ()  # further (name, value) pairs of ContextParallelConfig


def train(algorithm, cp, tp, steps, options):
    """[(loss, gradient norm)] of every step; the batch and the initial weights do not depend on the sizes.

    Without an ``algorithm`` the settings come from elsewhere.
    """
    if cp > 1 and algorithm:
        import mindspeed_cp.megatron_adaptor as adaptor

        adaptor.configure(
            ContextParallelConfig(context_parallel_size=cp, algorithm=algorithm, **dict(options.cp_options)),
            setup=TrainingSetup(num_attention_heads=HEADS, tensor_parallel_size=tp, fused_update=options.fused_update),
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    module = model_of(cp, tp, options)
    config = module.config
    if options.bf16:
        module = Float16Module(config, module)
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=options.distributed_optimizer), module
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=1.0,
            bf16=options.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=options.distributed_optimizer,
        ),
        [model],
    )
    return [_step(model, optimizer) for _ in range(steps)]


def model_of(cp, tp, options):
    """On this rank's device, without what Megatron wraps around it."""
    config = _transformer_config(cp, tp, options)
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, position_embedding_type="rope").cuda()


def _transformer_config(cp, tp, options):
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(
        num_layers=options.layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=HIDDEN,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        context_parallel_size=cp,
        tensor_model_parallel_size=tp,
        sequence_parallel=options.sequence_parallel,
        bf16=options.bf16,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        finalize_model_grads_func=finalize_model_grads,
        **(recompute if options.recompute else {}),
    )


def _batch():
    tokens = torch.randint(1, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "attention_mask": None,
        "loss_mask": torch.ones(2, LENGTH),
        "position_ids": torch.arange(LENGTH).repeat(2, 1),
    }
    # As Megatron's training does: from pinned memory, and the host goes on.
    batch = {name: value if value is None else value.cuda(non_blocking=True) for name, value in batch.items()}
    return get_batch_on_this_cp_rank(batch)


def _loss_of(losses):
    loss = losses.float().sum() / (2 * LENGTH)
    total = loss.detach().clone()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return loss, {"loss": total}


def _forward_step(iterator, model):
    now = next(iterator)
    output = model(now["tokens"], now["position_ids"], None, labels=now["labels"], loss_mask=now["loss_mask"])
    return output, _loss_of


def _step(model, optimizer):
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter([_batch()]),
        model=[model],
        num_microbatches=1,
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    _, norm, _ = optimizer.step()
    return losses[0]["loss"].item(), float(norm)
