"""Processes with all that they have started, on Linux."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 30  # seconds that the kernel gets to take back what killed processes held


def children(pid: int) -> list[int]:
    """Direct and indirect children of a process, from /proc."""
    direct = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it may end meanwhile
            direct += [int(child) for child in path.read_text(encoding="ascii").split()]
    return direct + [other for child in direct for other in children(child)]


def end(process: "subprocess.Popen[Any]") -> None:
    """End a process and all that it has started, sessions of their own included: ranks would keep their devices."""
    pids = [process.pid, *children(process.pid)]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + PATIENCE
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether there is such a process, which is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run(command: Sequence[str], limit: float | None = None, **options: Any) -> int:
    """The exit status of a command.

    Args:
        limit: seconds, after which it is ended with all that it has started.

    Raises:
        subprocess.TimeoutExpired: it was ended.
    """
    process = subprocess.Popen(command, **options)
    try:
        return process.wait(timeout=limit)
    finally:
        if process.poll() is None:
            end(process)
