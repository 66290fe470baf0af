"""Rules that involve several flags; the rule of a single value is declared with its flag (trainer/rules.py)."""

from argparse import Namespace
from typing import Any

from mindspeed_cp.settings.rules import heads_of_rank, require, require_even_tokens


def of_same_name(args: Namespace, names: str) -> dict[str, Any]:
    """Return flags by name, for a function of Megatron whose arguments have the same names."""
    return {name: getattr(args, name) for name in names.split()}


def micro_batch_length(index: int, seq_length: int) -> int:
    """Return the length of a micro batch: varying, from half of ``seq_length`` to all of it, mostly indivisible."""
    return seq_length - (index * index * 11 + index * 13 + 3) % max(seq_length // 2 - 1, 1)


def divisible(flag: str, value: int, by: str, divisor: int, *, more: bool = False, or_else: str = "") -> None:
    """Raise ValueError unless ``divisor``, which ``by`` describes, divides a flag's value. The message suggests the
    next smaller value that it divides, with ``more`` the next larger one, and ``or_else``.
    """
    fits = (value // divisor + more) * divisor or divisor
    require(value % divisor == 0, f"{flag} {value} must be divisible by {by}; use {flag} {fits}{or_else}.")


def read_packing(args: Any) -> None:
    """Set --cp-pack from newer Megatrons' names, and what it implies: separate documents, in rows of varying length."""
    args.cp_pack = args.cp_pack or args.dynamic_context_parallel or bool(args.sequence_packing_scheduler)
    tokens = args.max_seqlen_per_dp_cp_rank
    require(
        tokens is None or args.cp_pack,
        f"--max-seqlen-per-dp-cp-rank {tokens} is the room of packed rows; add --cp-pack, or leave it out.",
    )
    if not args.cp_pack:
        return
    require(
        args.micro_batch_size == 1,
        f"--cp-pack makes rows of documents, and a micro batch is one of them, not --micro-batch-size "
        f"{args.micro_batch_size}; use --micro-batch-size 1.",
    )
    require(
        not args.variable_seq_lengths,
        "--cp-pack does not go with --variable-seq-lengths, which cuts whole documents; leave one of them out.",
    )
    args.dynamic_context_parallel = args.reset_attention_mask = args.reset_position_ids = True
    if tokens is not None:
        args.seq_length = tokens * args.context_parallel_size


def check_model(args):
    heads, hidden = args.num_attention_heads, args.hidden_size
    if not args.kv_channels:
        divisible("--hidden-size", hidden, f"--num-attention-heads {heads}", heads, or_else=", or give --kv-channels")
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    require(
        args.max_position_embeddings >= args.seq_length,
        f"--max-position-embeddings {args.max_position_embeddings} must be at least --seq-length {args.seq_length}; "
        f"use --max-position-embeddings {args.seq_length}.",
    )
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = (4 * hidden * 2 // 3 + 63) // 64 * 64 if args.swiglu else 4 * hidden
    _check_rotary(args)
    _check_recompute(args)


def _check_rotary(args):
    channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    turned = int(channels * args.rotary_percent)
    require(
        args.position_embedding_type != "rope" or (turned >= 2 and turned % 2 == 0),
        f"--position-embedding-type rope turns pairs of channels, and --rotary-percent {args.rotary_percent:g} of "
        f"{channels} channels a head are {turned}, which must be even; use --kv-channels {max(channels // 2, 1) * 2} "
        "with --rotary-percent 1.0.",
    )


def _check_recompute(args):
    if args.recompute_activations:
        require(
            args.recompute_granularity != "full",
            "--recompute-activations is --recompute-granularity selective and does not go with full; leave one of "
            "them out.",
        )
        args.recompute_granularity = "selective"
    if args.recompute_granularity == "full":
        args.recompute_method = args.recompute_method or "uniform"
        args.recompute_num_layers = args.recompute_num_layers or 1
        return
    for name, value in of_same_name(args, "recompute_method recompute_num_layers").items():
        flag = "--" + name.replace("_", "-")
        what = f"{flag} {value} says which layers are recomputed as a whole"
        require(value is None, f"{what}; add --recompute-granularity full, or leave {flag} out.")


def check_parallel(args):
    tp, pp, layers = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_layers
    args.data_parallel_size = args.world_size // (tp * pp * args.context_parallel_size)
    _check_stages(args, pp, layers)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    heads_of_rank(args.num_attention_heads, groups, tp)
    divisible("--ffn-hidden-size", args.ffn_hidden_size, f"--tensor-model-parallel-size {tp}", tp, more=True)
    require(
        not args.sequence_parallel or tp > 1,
        f"--sequence-parallel needs tensor parallelism, and --tensor-model-parallel-size is {tp}; use 2 or more, or "
        "leave --sequence-parallel out.",
    )
    _check_lengths(args, tp)


def _check_stages(args, pp, layers):
    virtual = args.num_virtual_stages_per_pipeline_rank
    require(
        not virtual or pp > 1,
        f"--num-virtual-stages-per-pipeline-rank {virtual} needs a pipeline; use --pipeline-model-parallel-size 2 or "
        "more, or leave it out.",
    )
    stages = pp * (virtual or 1)
    by = f"--pipeline-model-parallel-size {pp} x virtual stages = {stages}"
    divisible("--num-layers", layers, by, stages, more=True)
    pieces, of_stage = args.recompute_num_layers, layers // stages
    require(
        not pieces or pieces <= of_stage and (args.recompute_method == "block" or of_stage % pieces == 0),
        f"--recompute-num-layers {pieces} must divide the {of_stage} layers of a pipeline stage (with "
        f"--recompute-method block: be at most {of_stage}); use --recompute-num-layers 1.",
    )


def _check_lengths(args, tp):
    """Check lengths that vary, have documents or would leave a rank without a token."""
    shortest = args.seq_length - max(args.seq_length // 2 - 2, 0) if args.variable_seq_lengths else args.seq_length
    cp = args.context_parallel_size
    require(
        shortest >= cp,
        f"--seq-length {args.seq_length} leaves a context-parallel rank without a token (shortest sequence {shortest}, "
        f"--context-parallel-size {cp}); use --seq-length {2 * cp} or more, or a smaller --context-parallel-size.",
    )
    require(
        args.cp_config_resolved.attention_mask_type != "full" or not args.reset_attention_mask,
        "--cp-attention-mask-type full does not go with --reset-attention-mask, whose mask is causal within documents; "
        "leave one of them out.",
    )
    uneven = args.reset_attention_mask or args.variable_seq_lengths or args.seq_length % (2 * cp)
    require(
        cp == 1 or args.cp_config_resolved.layout_kind != "document_zigzag" or not uneven,
        "--cp-batch-layout document_zigzag needs documents that 2 x --context-parallel-size "
        f"{cp} = {2 * cp} divides, and with --reset-attention-mask, --variable-seq-lengths or --seq-length "
        f"{args.seq_length} they have other lengths; use --cp-batch-layout zigzag or balanced, which take any.",
    )
    if args.sequence_parallel:  # the configuration checks this if cp > 1
        require_even_tokens(args.seq_length, 1, tp)
    varying = "--cp-pack" if args.cp_pack else "--variable-seq-lengths" if args.variable_seq_lengths else ""
    require(
        not (varying and args.sequence_parallel),
        f"{varying} does not go with --sequence-parallel, which needs every length divisible by "
        f"--tensor-model-parallel-size {tp}; leave one of them out.",
    )
    require(
        not varying or cp == 1 or args.cp_setup.unaligned or args.context_parallel_algo != "ulysses_cp_algo",
        f"{varying} with --context-parallel-algo ulysses_cp_algo needs unaligned Ulysses; use "
        "--gather-size-calculator dynamic without --context-parallel-kv-cache-policy.",
    )
    require(
        not (args.num_virtual_stages_per_pipeline_rank and has_uneven_shapes(args)),
        f"--num-virtual-stages-per-pipeline-rank {args.num_virtual_stages_per_pipeline_rank} needs stages that pass on "
        f"tensors of one even shape; use a --seq-length divisible by {2 * cp} without --variable-seq-lengths, "
        "--cp-pack and --reset-attention-mask, or leave it out.",
    )


def has_uneven_shapes(args) -> bool:
    """Whether pipeline stages must send each other their shapes, because the sequence is not divided evenly."""
    packed = args.reset_attention_mask and args.context_parallel_size > 1
    return (
        args.variable_seq_lengths or args.cp_pack or args.seq_length % (2 * args.context_parallel_size) != 0 or packed
    )


def check_batch(args):
    batch = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = args.global_batch_size or batch
    by = f"--micro-batch-size {args.micro_batch_size} x data parallel size {args.data_parallel_size} = {batch}"
    divisible("--global-batch-size", args.global_batch_size, by, batch)
    args.num_microbatches = args.global_batch_size // batch
    pp = args.pipeline_model_parallel_size
    require(
        not args.num_virtual_stages_per_pipeline_rank or args.num_microbatches % pp == 0,
        f"--num-virtual-stages-per-pipeline-rank {args.num_virtual_stages_per_pipeline_rank} needs micro batches in "
        f"multiples of --pipeline-model-parallel-size {pp}, and a step has {args.num_microbatches}; use "
        f"--global-batch-size {batch * pp}.",
    )


def check_training(args):
    decay = args.lr_decay_iters or args.train_iters
    require(args.min_lr <= args.lr, f"--min-lr {args.min_lr:g} must be at most --lr {args.lr:g}; use --min-lr 0.")
    require(
        args.lr_warmup_iters < decay,
        f"--lr-warmup-iters {args.lr_warmup_iters} must be below the steps of decay {decay} (--lr-decay-iters, else "
        f"--train-iters); use --lr-warmup-iters {decay // 10}.",
    )
    require(
        not args.eval_iters or float((args.split + ",0").split(",")[1]) > 0,
        f"--eval-iters {args.eval_iters} needs documents for validation, and --split {args.split} leaves none; use "
        "--split 90,10,0, or --eval-iters 0.",
    )
    for flag, value in (("--save-interval", args.save_interval), ("--keep-last", args.keep_last)):
        require(value is None or args.save, f"{flag} {value} needs a folder; add --save FOLDER, or leave {flag} out.")
