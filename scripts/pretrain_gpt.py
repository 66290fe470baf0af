"""Train a GPT on megatron-core alone: no Megatron-LM checkout needed. ``--help`` lists the flags, named as Megatron's are.

    torchrun --nproc-per-node 4 scripts/pretrain_gpt.py --data-path data/topics --context-parallel-size 4 ...
"""

import warnings

# Megatron says for each module that it works without apex and Transformer Engine.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
warnings.filterwarnings("ignore", message=".*we are deprecating ShardedTensor")

import mindspeed_cp.megatron_adaptor  # noqa: F401  before anything else of Megatron

from trainer.arguments import parse_args
from trainer.loop import pretrain

from mindspeed_cp.arguments import readable_errors


def main(argv=None):
    with readable_errors("pretrain_gpt.py"):
        args = parse_args(argv)
    pretrain(args)


if __name__ == "__main__":
    main()
