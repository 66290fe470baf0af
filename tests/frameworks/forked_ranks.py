"""Ranks forked from a process that has imported a framework already: each run starts at once and from scratch."""

import json
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path

from distributed import free_port


def print_found(cases, function, only=""):
    """Run (name, world size, arguments of ``function``) of every name that holds ``only``.

    Prints name -> the results of its ranks, or what a rank said that failed.
    """
    found = {}
    for name, world, arguments in cases:
        if only in name:
            try:
                found[name] = run_forked(world, function, *arguments)
            except RuntimeError as error:
                found[name] = str(error)
    print(json.dumps(found))


def run_forked(world, function, *arguments, seconds=120):
    """``function(rank, *arguments)`` on ``world`` ranks with torchrun's variables; the results, in rank order.

    Args:
        function: returns what JSON holds.

    Raises:
        RuntimeError: a rank failed or took too long; its message holds the end of what the ranks said.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        started = {_fork(rank, world, port, Path(folder), function, arguments): rank for rank in range(world)}
        try:
            _wait(started, Path(folder), time.monotonic() + seconds)
        finally:
            for process in started:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _fork(rank, world, port, folder, function, arguments):
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in sizes.items()}, MASTER_ADDR="127.0.0.1")
        with (folder / f"{rank}.log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        (folder / f"{rank}.json").write_text(json.dumps(function(rank, *arguments)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _wait(started, folder, deadline):
    while started:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            rank = started.pop(process)
            if status:
                raise RuntimeError(f"rank {rank} failed:\n{_said(folder, rank)}")
        elif time.monotonic() > deadline:
            late = sorted(started.values())
            raise RuntimeError(f"ranks {late} took too long:\n{_said(folder, *late)}")
        else:
            time.sleep(0.01)


def _said(folder, *ranks, lines=25):
    logs = [(rank, (folder / f"{rank}.log").read_text(errors="replace").splitlines()) for rank in ranks]
    return "\n".join(f"[{rank}] {line}" for rank, said in logs for line in said[-lines:])
