"""torchrun that prints only the training script's own message if the script rejects its flags.

    python -m mindspeed_cp.torchrun --nproc-per-node 8 scripts/pretrain_gpt.py ...

If a script prints one line about a wrong command line and ends with status 2, torchrun adds forty lines of its own and
ends with status 1. Here only the line is printed, and the status is 2. Everything else is torchrun's.
"""

import logging
import os
import sys
from collections.abc import Sequence

REFUSED = 2  # exit status of a script whose flags are wrong
LOGGER = "torch.distributed.elastic.multiprocessing.api"


class _Held(logging.Filter):
    """Holds back torchrun's log about failed ranks until it is known why the first of them failed."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        self.records.append(record)
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 2 if the first failed rank rejected its flags, else torchrun's status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, but without its five lines of notice
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
