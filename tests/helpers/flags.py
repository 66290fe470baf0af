"""For tests of the command line: a parser with those flags of Megatron against which ours are checked."""

import argparse

from mindspeed_cp.arguments import add_context_parallel_arguments

MODEL = "--num-attention-heads 8 --num-layers 4 --seq-length 1024".split()


def make_parser():
    parser = argparse.ArgumentParser(prog="pretrain_gpt.py")
    for flag in (
        "--num-attention-heads",
        "--num-layers",
        "--seq-length",
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--num-query-groups",
    ):
        parser.add_argument(flag, type=int, default=1)
    for flag in ("--group-query-attention", "--sequence-parallel", "--use-legacy-models"):
        parser.add_argument(flag, action="store_true")
    return add_context_parallel_arguments(parser)


def parse(*flags):
    return make_parser().parse_args([*MODEL, *flags])
