"""Train a GPT with megatron-core only: no Megatron-LM checkout is needed. ``--help`` lists the flags, which have
Megatron's names.

torchrun --nproc-per-node 4 scripts/pretrain_gpt.py --data-path data/topics --context-parallel-size 4 ...
"""

import trainer.quiet  # noqa: F401  before Megatron warns
import mindspeed_cp.megatron_adaptor  # noqa: F401  before anything else of Megatron

import os
import warnings

from torch.distributed.elastic.multiprocessing.errors import record

from trainer.arguments import parse_args
from trainer.failures import readable_failures, readable_flags
from trainer.loop import pretrain

from mindspeed_cp.settings.notices import ContextParallelWarning


@record
def main(argv=None):
    show = warnings.showwarning
    with readable_flags(), warnings.catch_warnings():
        # Warnings of the configuration are for the user, so print them without a source line.
        warnings.showwarning = lambda message, category, *rest: (
            print(f"note: {message}", flush=True)
            if issubclass(category, ContextParallelWarning)
            else show(message, category, *rest)
        )
        args = parse_args(argv)
    with readable_failures(int(os.environ.get("RANK", "0"))):
        pretrain(args)


if __name__ == "__main__":
    main()
