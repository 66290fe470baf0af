"""Flags of the embedded trainer. Names and meanings are Megatron's; what Megatron has and this trainer has not is
refused.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import torch

from mindspeed_cp.arguments import add_context_parallel_arguments, validate
from trainer.tokenizer import VOCAB_SIZE


def parse_args(argv=None, world_size=None):
    """Parse and check the command line; no process group is made before this has succeeded.

    Returns:
        The namespace, with ``cp_config_resolved`` and ``cp_setup`` (what ``mindspeed_cp.arguments.validate`` returned),
        ``data_parallel_size``, ``num_microbatches`` and ``params_dtype`` added.

    Raises:
        ValueError: a flag breaks a rule; the message names flag, value, rule and a way out.
    """
    args = build_parser().parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    _check_numbers(args)
    args.cp_config_resolved, args.cp_setup = validate(args, args.world_size)
    _check_model(args)
    _check_parallel(args)
    _check_files(args)
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float32
    return args


def build_parser():
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_parallel(parser.add_argument_group("parallelism"))
    _add_data(parser.add_argument_group("data"))
    _add_files(parser.add_argument_group("checkpoints and logs"))
    return add_context_parallel_arguments(parser)


def _add_model(group):
    add = group.add_argument
    add("--num-layers", type=int, default=2, help="transformer layers")
    add("--hidden-size", type=int, default=128, help="width of the model")
    add("--ffn-hidden-size", type=int, help="width of the MLP; default: 4 x hidden size, with --swiglu 2/3 of it")
    add("--num-attention-heads", type=int, default=8, help="query heads")
    add("--kv-channels", type=int, help="head dimension; default: hidden size / heads")
    add("--group-query-attention", action="store_true", help="share KV heads between query heads")
    add("--num-query-groups", type=int, default=1, help="KV heads, with --group-query-attention")
    add("--seq-length", type=int, default=1024, help="tokens of a sequence, over all context-parallel ranks")
    add("--max-position-embeddings", type=int, help="learned positions; default: --seq-length")
    add(
        "--position-embedding-type",
        choices=["learned_absolute", "rope", "none"],
        default="learned_absolute",
        help="how tokens know their place",
    )
    add("--rotary-base", type=int, default=10000, help="base of RoPE")
    add("--rotary-percent", type=float, default=1.0, help="share of the head dimension that RoPE turns")
    add("--normalization", choices=["LayerNorm", "RMSNorm"], default="LayerNorm", help="kind of norm")
    add("--norm-epsilon", type=float, default=1e-5, help="epsilon of the norms")
    add("--swiglu", action="store_true", help="gated SiLU instead of GELU")
    add("--disable-bias-linear", action="store_false", dest="add_bias_linear", help="no bias in linear layers")
    add("--add-qkv-bias", action="store_true", help="bias in the QKV projection alone")
    add("--untie-embeddings-and-output-weights", action="store_true", help="output layer with weights of its own")
    add("--window-size", type=_window, help="sliding window as LEFT,RIGHT tokens, such as 128,0")
    add("--attention-dropout", type=float, default=0.0, help="dropout of attention probabilities")
    add("--hidden-dropout", type=float, default=0.0, help="dropout of hidden states")
    add("--init-method-std", type=float, default=0.02, help="standard deviation of the initial weights")


def _add_training(group):
    add = group.add_argument
    add("--micro-batch-size", type=int, default=1, help="sequences of one forward pass")
    add("--global-batch-size", type=int, help="sequences of one step; default: micro batch x data parallel size")
    add("--train-iters", type=int, default=20, help="steps")
    add("--lr", type=float, default=1e-3, help="highest learning rate")
    add("--min-lr", type=float, default=0.0, help="lowest learning rate")
    add("--lr-warmup-iters", type=int, default=0, help="steps of linear warm-up")
    add("--lr-decay-iters", type=int, help="steps of decay; default: --train-iters")
    add("--lr-decay-style", choices=["constant", "linear", "cosine"], default="cosine", help="shape of the decay")
    add("--weight-decay", type=float, default=0.01, help="AdamW weight decay")
    add("--adam-beta1", type=float, default=0.9, help="Adam's first moment")
    add("--adam-beta2", type=float, default=0.95, help="Adam's second moment")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm")
    add("--bf16", action="store_true", help="weights and activations in bfloat16, master weights in float32")
    add("--seed", type=int, default=1234, help="seed of weights, data order and dropout")
    add(
        "--calculate-per-token-loss",
        action="store_true",
        help="average over all tokens of the step, not per micro batch",
    )
    add("--recompute-granularity", choices=["full", "selective"], help="recompute layers, or core attention alone")
    add(
        "--recompute-method", choices=["uniform", "block"], help="which layers, with granularity full; default: uniform"
    )
    add("--recompute-num-layers", type=int, help="layers per recomputed piece; default: 1")
    add("--recompute-activations", action="store_true", help="the same as --recompute-granularity selective")
    add("--use-distributed-optimizer", action="store_true", help="shard the optimizer over data-parallel ranks")
    add("--overlap-grad-reduce", action="store_true", help="reduce gradients while the backward pass runs")


def _add_parallel(group):
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer")
    add("--pipeline-model-parallel-size", type=int, default=1, help="ranks that share the stack of layers")
    add("--num-virtual-stages-per-pipeline-rank", type=int, help="interleaved stages of a pipeline rank")
    add("--sequence-parallel", action="store_true", help="split norms and dropout over tensor-parallel ranks")
    add("--distributed-timeout-minutes", type=float, default=10.0, help="give up on a silent peer after this time")


def _add_data(group):
    add = group.add_argument
    add("--data-path", help="prefix of an indexed dataset: PREFIX.bin and PREFIX.idx (scripts/prepare_data.py)")
    add("--data-cache-path", help="folder for Megatron's index caches; default: beside the data")
    add("--split", default="90,10,0", help="shares of the documents for training, validation and test")
    add("--vocab-size", type=int, default=VOCAB_SIZE, help="tokens of the vocabulary, before padding")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="padding of the vocabulary")
    add("--reset-position-ids", action="store_true", help="count positions from each document's start")
    add("--reset-attention-mask", action="store_true", help="attention never crosses the end of a document")
    add("--eod-mask-loss", action="store_true", help="no loss on end-of-document tokens")
    add(
        "--variable-seq-lengths",
        action="store_true",
        help="cut every micro batch to a length of its own, at most --seq-length and the same in every run",
    )


def _add_files(group):
    add = group.add_argument
    add("--save", help="folder for checkpoints (sharded; they resume under other parallel sizes)")
    add("--load", help="folder of the checkpoint to resume; the latest in it is taken")
    add("--save-interval", type=int, help="steps between checkpoints; default: at the end alone")
    add("--exit-interval", type=int, help="stop after a step that this number divides, as if the job had ended")
    add("--eval-interval", type=int, default=1000, help="steps between validations")
    add("--eval-iters", type=int, default=0, help="steps of one validation; 0: none")
    add("--log-interval", type=int, default=1, help="steps between printed lines")
    add("--log-file", help="JSON lines with loss, gradient norm and communicated bytes of every step")
    add("--tensorboard-dir", help="folder for TensorBoard scalars")


def _window(text):
    try:
        left, right = (int(part) for part in text.strip("()").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be LEFT,RIGHT, such as 128,0") from None
    return left, right


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _check_model(args):
    heads, hidden = args.num_attention_heads, args.hidden_size
    _require(
        args.kv_channels or hidden % heads == 0,
        f"--hidden-size {hidden} must be divisible by --num-attention-heads {heads}; use --hidden-size "
        f"{hidden // heads * heads or heads}, or give --kv-channels.",
    )
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    _require(
        args.max_position_embeddings >= args.seq_length,
        f"--max-position-embeddings {args.max_position_embeddings} must be at least --seq-length {args.seq_length}; "
        f"use --max-position-embeddings {args.seq_length}.",
    )
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = (4 * hidden * 2 // 3 + 63) // 64 * 64 if args.swiglu else 4 * hidden
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.recompute_granularity == "full":
        args.recompute_method = args.recompute_method or "uniform"
        args.recompute_num_layers = args.recompute_num_layers or 1


def _check_numbers(args):
    """Sizes that argparse lets through and nothing can be made of."""
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters"):
        value = getattr(args, name)
        _require(value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1.")
    for name in ("attention_dropout", "hidden_dropout"):
        value = getattr(args, name)
        _require(0 <= value < 1, f"--{name.replace('_', '-')} {value} must lie between 0 and 1; 0 switches it off.")


def _check_parallel(args):
    tp, pp, layers = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_layers
    args.data_parallel_size = args.world_size // (tp * pp * args.context_parallel_size)
    stages = pp * (args.num_virtual_stages_per_pipeline_rank or 1)
    _require(
        layers % stages == 0,
        f"--num-layers {layers} must be divisible by --pipeline-model-parallel-size {pp} x virtual stages = {stages}; "
        f"use --num-layers {(layers // stages + 1) * stages}.",
    )
    _require(
        not args.num_virtual_stages_per_pipeline_rank or pp > 1,
        f"--num-virtual-stages-per-pipeline-rank {args.num_virtual_stages_per_pipeline_rank} needs a pipeline; use "
        "--pipeline-model-parallel-size 2 or more, or leave it out.",
    )
    flag, groups = (
        ("--num-query-groups", args.num_query_groups)
        if args.group_query_attention
        else ("--num-attention-heads", args.num_attention_heads)
    )
    _require(
        groups % tp == 0 or (args.group_query_attention and tp % groups == 0),
        f"{flag} {groups} must be divisible by --tensor-model-parallel-size {tp}; use {flag} "
        f"{max(groups // tp, 1) * tp}, or a --tensor-model-parallel-size that divides {groups}.",
    )
    _require(
        args.cp_config_resolved.attention_mask_type == "causal" or not args.reset_attention_mask,
        "--cp-attention-mask-type full does not go with --reset-attention-mask, whose mask is causal within documents; "
        "leave one of them out.",
    )
    _require(
        not (args.variable_seq_lengths and args.sequence_parallel),
        "--variable-seq-lengths does not go with --sequence-parallel, which needs every length divisible by "
        f"--tensor-model-parallel-size {tp}; leave one of them out.",
    )
    _require(
        not args.variable_seq_lengths
        or args.context_parallel_size == 1
        or args.cp_setup.unaligned
        or args.context_parallel_algo != "ulysses_cp_algo",
        "--variable-seq-lengths with --context-parallel-algo ulysses_cp_algo needs unaligned Ulysses; use "
        "--gather-size-calculator dynamic without --context-parallel-kv-cache-policy.",
    )
    _require(
        not args.sequence_parallel or tp > 1,
        f"--sequence-parallel needs tensor parallelism, and --tensor-model-parallel-size is {tp}; use 2 or more, or "
        "leave --sequence-parallel out.",
    )
    batch = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = args.global_batch_size or batch
    _require(
        args.global_batch_size % batch == 0,
        f"--global-batch-size {args.global_batch_size} must be divisible by --micro-batch-size "
        f"{args.micro_batch_size} x "
        f"data parallel size {args.data_parallel_size} = {batch}; use --global-batch-size "
        f"{max(args.global_batch_size // batch, 1) * batch}.",
    )
    args.num_microbatches = args.global_batch_size // batch


def _check_files(args):
    _require(
        args.data_path is not None,
        "--data-path is not given, and training needs a dataset; make one with: python scripts/prepare_data.py "
        "--output "
        "data/topics, then use --data-path data/topics.",
    )
    for ending in (".bin", ".idx"):
        _require(
            Path(args.data_path + ending).is_file(),
            f"--data-path {args.data_path}: the file {args.data_path}{ending} does not exist; make it with: python "
            f"scripts/prepare_data.py --output {args.data_path}",
        )
    fused_adam = any(importlib.util.find_spec(name) for name in ("apex", "transformer_engine"))
    _require(
        fused_adam or not args.use_distributed_optimizer or not (args.save or args.load),
        "--use-distributed-optimizer does not go with --save or --load on this machine: megatron-core stores its state "
        "for the Adam of apex or Transformer Engine alone; leave --use-distributed-optimizer out, or install apex.",
    )
    if args.load is not None:
        _require(
            Path(args.load, "latest.txt").is_file(),
            f"--load {args.load} holds no checkpoint (no {Path(args.load, 'latest.txt')}); give the folder that --save "
            "wrote, or leave --load out.",
        )
