"""Ranks that are forks of this process: what they import is imported once."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench import free_port


def start(world_size: int, outputs: Callable[[int], tuple[Path, Path]], life: Callable[[int], None]) -> dict[int, int]:
    """Fork ``world_size`` ranks that call ``life(rank)``, with the variables that torch.distributed reads; pid -> rank.

    A rank's exit status is 0, that of a SystemExit, or 1 after an error, whose traceback it prints.

    Args:
        outputs: files for what a rank prints, and for its errors.
    """
    port, ranks = free_port(), {}
    sys.stdout.flush()
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, world_size, port, outputs(rank), life)
        ranks[pid] = rank
    return ranks


def _be_rank(rank, world_size, port, outputs, life):
    status = 1
    try:
        os.setpgid(0, 0)
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in own.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        life(rank)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(
    ranks: dict[int, int], limit: float, patience: Callable[[int, int], float] = lambda rank, status: float("inf")
) -> dict[int, int]:
    """rank -> exit status (negative: a signal); ranks that have not ended by the limit are ended, and not in it.

    Args:
        limit: seconds. patience: (rank, status that is not 0) -> seconds that the others have from then on.
    """
    statuses, end = {}, time.monotonic() + limit
    while len(statuses) < len(ranks) and time.monotonic() < end:
        for pid, rank in ranks.items():
            if rank not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[rank] = os.waitstatus_to_exitcode(ended[1])
                if statuses[rank]:
                    end = min(end, time.monotonic() + patience(rank, statuses[rank]))
        time.sleep(0.01)
    for pid, rank in ranks.items():
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and what the rank started itself and left behind
        if rank not in statuses:
            os.waitpid(pid, 0)
    return statuses
