"""Print what the context-parallel flags of a launch script come to, and check them: the last part of DRY_RUN=1.

WORLD_SIZE=8 python scripts/launch/describe.py FLAGS...
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindspeed_cp import SequenceLayout
from mindspeed_cp.arguments import add_context_parallel_arguments, readable_errors, validate


def parse(argv):
    """The flags that the rules of context parallelism need; all others are left to pretrain_gpt.py."""
    parser = argparse.ArgumentParser(prog="describe.py", allow_abbrev=False)
    for flag in (
        "num-layers",
        "num-attention-heads",
        "seq-length",
        "tensor-model-parallel-size",
        "pipeline-model-parallel-size",
    ):
        parser.add_argument(f"--{flag}", type=int, default=1)
    parser.add_argument("--num-query-groups", type=int)
    for flag in ("group-query-attention", "sequence-parallel", "use-legacy-models"):
        parser.add_argument(f"--{flag}", action="store_true")
    return add_context_parallel_arguments(parser).parse_known_args(argv)[0]


def main():
    args = parse(sys.argv[1:])
    with readable_errors("describe.py"):
        config, _ = validate(args, int(os.environ["WORLD_SIZE"]))
        layout = SequenceLayout.build(config, args.seq_length)
    ulysses, window, windows = config.hierarchy
    lengths = sorted({layout.length(rank) for rank in range(config.context_parallel_size)})
    print("CONTEXT_PARALLEL=" + config.describe())
    print(f"HIERARCHY=ulysses {ulysses} x window {window} x windows {windows}")
    print("TOKENS_PER_RANK=" + " or ".join(map(str, lengths)))


if __name__ == "__main__":
    main()
