"""Flags of the embedded trainer. Names and meanings are Megatron's; Megatron's other flags are rejected."""

import argparse
import os

import torch

from mindspeed_cp.arguments import add_context_parallel_arguments, validate
from trainer.checks import check_batch, check_model, check_parallel, check_training, read_packing
from trainer.files import check_files
from trainer.rules import HelpFormatter, OneLineParser, length, one_of, path, real, shares, whole, window
from trainer.texts import VOCAB_SIZE


def parse_args(argv: list[str] | None = None, world_size: int | None = None) -> argparse.Namespace:
    """Parse and check the command line; no process group is made before this has succeeded.

    Returns:
        The namespace, with ``cp_config_resolved`` and ``cp_setup`` (results of ``mindspeed_cp.arguments.validate``),
        ``data_parallel_size``, ``num_microbatches``, ``params_dtype`` and ``resume`` (the Checkpoint to resume from, or
        None) added.

    Raises:
        SystemExit: the value of a flag violates its rule; one line is printed and the status is 2.
        ValueError: flags conflict; the message names flag, value, rule and a way out.
    """
    args = build_parser().parse_args(argv)
    read_packing(args)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    args.cp_config_resolved, args.cp_setup = validate(args, args.world_size)
    check_model(args)
    check_parallel(args)
    check_batch(args)
    check_training(args)
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float32
    args.resume = check_files(args)
    return args


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="pretrain_gpt.py",
        description="Train a GPT on megatron-core alone. Names and meanings of the flags are Megatron's.",
        usage="torchrun --nproc-per-node N scripts/pretrain_gpt.py --data-path PREFIX [flags]",
        formatter_class=HelpFormatter,
    )
    _add_model(_adder(parser, "model"))
    _add_training(_adder(parser, "training"))
    _add_parallel(_adder(parser, "parallelism"))
    _add_data(_adder(parser, "data"))
    _add_files(_adder(parser, "checkpoints and logs"))
    return add_context_parallel_arguments(parser)


def _adder(parser, title):
    """A function ``add(flag, rule, ...)`` for an argument group: argparse's add_argument with the rule as type."""
    group = parser.add_argument_group(title)

    def add(flag, rule=None, **options):
        if rule is not None:
            options |= {"type": rule.of(flag), "metavar": rule.metavar, "choices": rule.choices}
        group.add_argument(flag, **options)

    return add


def _add_model(add):
    add("--num-layers", whole(1), default=2, help="transformer layers")
    add("--hidden-size", whole(1), default=128, help="width of the model")
    add("--ffn-hidden-size", whole(1), help="width of the MLP; default: 4 x hidden size, with --swiglu 2/3 of it")
    add("--num-attention-heads", whole(1), default=8, help="query heads")
    add("--kv-channels", whole(1), help="head dimension; default: hidden size / heads")
    add("--group-query-attention", action="store_true", help="share KV heads between query heads")
    add("--num-query-groups", whole(1), default=1, help="KV heads, with --group-query-attention")
    add("--seq-length", length(), default=1024, help="tokens of a sequence, over all context-parallel ranks")
    add("--max-position-embeddings", length(), help="learned positions; default: --seq-length")
    kinds = one_of("learned_absolute", "rope", "none")
    add("--position-embedding-type", kinds, default="learned_absolute", help="how positions are encoded")
    add("--rotary-base", whole(1), default=10000, help="base of RoPE")
    turned = real(0, 1, open_low=True, example="1.0")
    add("--rotary-percent", turned, default=1.0, help="share of the head dimension that RoPE rotates")
    add("--normalization", one_of("LayerNorm", "RMSNorm"), default="LayerNorm", help="kind of norm")
    add("--norm-epsilon", real(0, open_low=True, example="1e-5"), default=1e-5, help="epsilon of the norms")
    add("--swiglu", action="store_true", help="gated SiLU instead of GELU")
    add("--disable-bias-linear", action="store_false", dest="add_bias_linear", help="no bias in linear layers")
    add("--add-qkv-bias", action="store_true", help="bias in the QKV projection alone")
    add("--untie-embeddings-and-output-weights", action="store_true", help="output layer with its own weights")
    add("--window-size", window(), help="sliding window as LEFT,RIGHT tokens, such as 128,0")
    dropout = real(0, 1, open_high=True, example="0.0")
    add("--attention-dropout", dropout, default=0.0, help="dropout of attention probabilities")
    add("--hidden-dropout", dropout, default=0.0, help="dropout of hidden states")
    deviation = real(0, open_low=True, example="0.02")
    add("--init-method-std", deviation, default=0.02, help="standard deviation of the initial weights")


def _add_training(add):
    rate = real(0, example="1e-3")
    add("--micro-batch-size", whole(1), default=1, help="sequences of one forward pass")
    add("--global-batch-size", whole(1), help="sequences of one step; default: micro batch x data parallel size")
    add("--train-iters", whole(1), default=20, help="steps")
    add("--lr", rate, default=1e-3, help="highest learning rate")
    add("--min-lr", rate, default=0.0, help="lowest learning rate")
    add("--lr-warmup-iters", whole(0), default=0, help="steps of linear warm-up")
    add("--lr-decay-iters", whole(1), help="steps of decay; default: --train-iters")
    add("--lr-decay-style", one_of("constant", "linear", "cosine"), default="cosine", help="shape of the decay")
    add("--weight-decay", real(0, example="0.01"), default=0.01, help="AdamW weight decay")
    moment = real(0, 1, open_high=True, example="0.9")
    add("--adam-beta1", moment, default=0.9, help="Adam's first moment")
    add("--adam-beta2", moment, default=0.95, help="Adam's second moment")
    add("--clip-grad", real(0, example="1.0"), default=1.0, help="largest gradient norm; 0: no clipping")
    add("--bf16", action="store_true", help="weights and activations in bfloat16, master weights in float32")
    add("--seed", whole(0), default=1234, help="seed of weights, data order and dropout")
    per_token = "average over all tokens of the step, not per micro batch"
    add("--calculate-per-token-loss", action="store_true", help=per_token)
    add("--recompute-granularity", one_of("full", "selective"), help="recompute layers, or core attention alone")
    add("--recompute-method", one_of("uniform", "block"), help="which layers, with granularity full; default: uniform")
    add("--recompute-num-layers", whole(1), help="layers per recomputed piece; default: 1")
    add("--recompute-activations", action="store_true", help="the same as --recompute-granularity selective")
    add("--use-distributed-optimizer", action="store_true", help="shard the optimizer over data-parallel ranks")
    add("--overlap-grad-reduce", action="store_true", help="reduce gradients while the backward pass runs")


def _add_parallel(add):
    add("--tensor-model-parallel-size", whole(1), default=1, help="ranks that share each layer")
    add("--pipeline-model-parallel-size", whole(1), default=1, help="ranks over which the layers are distributed")
    add("--num-virtual-stages-per-pipeline-rank", whole(2), help="interleaved stages of a pipeline rank")
    add("--sequence-parallel", action="store_true", help="split norms and dropout over tensor-parallel ranks")
    minutes = real(0, 525600, open_low=True, example="10")
    add("--distributed-timeout-minutes", minutes, default=10.0, help="give up on a silent peer after this time")


def _add_data(add):
    prefix = path("data/topics", "PREFIX")
    add("--data-path", prefix, help="an indexed dataset: PREFIX.bin and PREFIX.idx (scripts/prepare_data.py)")
    add("--data-cache-path", path("data/cache"), help="folder for Megatron's index caches; default: beside the data")
    add("--split", shares(), default="90,10,0", help="shares of the documents for training, validation and test")
    add("--vocab-size", whole(VOCAB_SIZE), default=VOCAB_SIZE, help="tokens of the vocabulary, before padding")
    add("--make-vocab-size-divisible-by", whole(1), default=128, help="padding of the vocabulary")
    add("--reset-position-ids", action="store_true", help="count positions from each document's start")
    add("--reset-attention-mask", action="store_true", help="attention never crosses the end of a document")
    add("--eod-mask-loss", action="store_true", help="no loss on end-of-document tokens")
    varying = "cut every micro batch to a different length, at most --seq-length and the same in every run"
    add("--variable-seq-lengths", action="store_true", help=varying)
    packing = "rows of at most --seq-length tokens over all context-parallel ranks, filled with documents by length, "
    packing += "each of which begins anew and is whole if no longer than a row; --global-batch-size counts rows"
    add("--cp-pack", action="store_true", help=packing)
    add("--dynamic-context-parallel", action="store_true", help="newer Megatrons' name: the same as --cp-pack")
    schedulers = one_of("dp_balanced", "default_dynamic_cp")
    add("--sequence-packing-scheduler", schedulers, help="newer Megatrons' name: any is the same as --cp-pack")
    add("--max-seqlen-per-dp-cp-rank", length(), help="tokens of a rank in a row, instead of --seq-length")


def _add_files(add):
    folder = path("checkpoints")
    add("--save", folder, help="folder for checkpoints (sharded; they resume under other parallel sizes)")
    load = "folder of the checkpoint to resume; the latest one is used. The folder of --save may be empty, so that "
    load += "one command serves the first start and every restart. Load only checkpoints you trust: checksums find "
    add("--load", folder, help=load + "damage, not malice")
    add("--save-interval", whole(1), help="steps between checkpoints; default: only at the end")
    add("--keep-last", whole(1), help="checkpoints that stay in --save, the newest ones; default: all")
    add("--exit-interval", whole(1), help="stop after a step that this number divides, as if the job had ended")
    add("--eval-interval", whole(1), default=1000, help="steps between validations")
    add("--eval-iters", whole(0), default=0, help="steps per validation; 0: none")
    add("--log-interval", whole(1), default=1, help="steps between printed lines")
    add("--log-file", path("logs/run.jsonl", "FILE"), help="JSON lines with loss, gradient norm and bytes of each step")
    add("--tensorboard-dir", path("logs/board"), help="folder for TensorBoard scalars")
