"""torchrun, with the words of the training script alone where it refuses its flags.

    python -m mindspeed_cp.torchrun --nproc-per-node 8 scripts/pretrain_gpt.py ...

torchrun answers a script that ends with status 2, having said in one line what is wrong with its command line, with
forty lines of its own and status 1. Here the line stays alone, and the status is 2. Everything else is torchrun's.
"""

import logging
import os
import sys
from collections.abc import Sequence

REFUSED = 2  # the status of a script whose flags are wrong
LOGGER = "torch.distributed.elastic.multiprocessing.api"


class _Held(logging.Filter):
    """Keeps what torchrun logs of ranks that end until it is known why the first of them did."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        self.records.append(record)
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 2 where the first rank that failed refused its flags, else what torchrun does."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which torchrun does too, with five lines
    held, logger = _Held(), logging.getLogger(LOGGER)
    logger.addFilter(held)
    try:
        run.run(run.parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode == REFUSED:
            held.records.clear()
            return REFUSED
        raise
    finally:
        logger.removeFilter(held)
        for record in held.records:
            logger.handle(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
