"""A training script on megatron-core with its own context parallelism, without this project: every rank gathers all
keys and values. ``--fault`` breaks it silently.

    mask        attention assumes that keys are in rank order
    positions   position ids count from 0 on every rank
"""

import argparse
import os
from functools import partial

import torch
import torch.distributed as dist

FAULTS = ("none", "mask", "positions")
VOCABULARY = 64


class Gather(torch.autograd.Function):
    """Concatenate the parts of all ranks of a group; their gradients are summed."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def zigzag(length, size, rank):
    """Positions of a rank, for a sequence of ``length``."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class OwnAttention(torch.nn.Module):
    """Megatron's core attention: query, key, value (seq of this rank, batch, heads, dim)."""

    fault = "none"

    def __init__(self, config, **_):
        super().__init__()
        self.scale = (config.hidden_size / config.num_attention_heads) ** -0.5

    def forward(self, query, key, value, *_, **__):
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        key, value = Gather.apply(key, group), Gather.apply(value, group)
        parts = [zigzag(len(key), size, other) for other in range(size)]
        positions = torch.arange(len(key)) if self.fault == "mask" else torch.cat(parts)
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        scores = scores.masked_fill(positions[None, :] > parts[rank][:, None], float("-inf"))
        return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


def build(args):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.num_attention_heads,
        context_parallel_size=args.context_parallel_size, attention_dropout=0.0, hidden_dropout=0.0,
        use_cpu_initialization=True, init_method_std=0.2, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = OwnAttention
    OwnAttention.fault = args.fault
    model = GPTModel(config, spec, VOCABULARY, args.seq_length, position_embedding_type="learned_absolute")
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def loss_of(tokens, losses):
    """This rank's share of the mean over all tokens; Megatron multiplies by the number of ranks, then averages."""
    total = losses.sum()
    return total / tokens, {"lm loss": (total.detach(), losses.numel())}


def forward_step(args, iterator, model):
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = get_batch_on_this_cp_rank(next(iterator))
    if args.fault == "positions":
        batch["position_ids"] = torch.arange(batch["tokens"].size(1))[None]
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_of, args.seq_length)


def main():
    parser = argparse.ArgumentParser()
    for flag, value in (("num-layers", 2), ("hidden-size", 64), ("num-attention-heads", 4), ("seq-length", 32)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    args = parser.parse_args()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    parallel_state.initialize_model_parallel(context_parallel_size=args.context_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    model = build(args)
    numbers = torch.randint(VOCABULARY, (1, args.seq_length + 1))
    batch = {
        "tokens": numbers[:, :-1],
        "labels": numbers[:, 1:],
        "loss_mask": torch.ones(1, args.seq_length),
        "position_ids": torch.arange(args.seq_length)[None],
    }
    get_forward_backward_func()(
        forward_step_func=partial(forward_step, args), data_iterator=iter([batch]), model=[model], num_microbatches=1,
        seq_length=args.seq_length, micro_batch_size=1, forward_only=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
