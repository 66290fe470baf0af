"""Train a GPT on megatron-core alone: no Megatron-LM checkout needed. ``--help`` lists the flags, named as Megatron's
are.

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
        # What the configuration has to say is for the user, not about a line of source.
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
