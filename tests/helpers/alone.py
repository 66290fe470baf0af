"""Runs functions and scripts in new processes that are forked from the ranks' server but belong to no pool."""

import multiprocessing
import os
import pickle
import runpy
import sys
import time
from pathlib import Path

from distributed import RankFailure, answered, device_type, forking_from, free_port, set_device_type, wake
from rank_server import end_with_parent

OUTPUTS = "out", "err"  # file names of script_outcome, in the order of file descriptors


def run_alone(function, *args, timeout=120.0):
    """``function(*args)`` in a new process that belongs to no process group and may fork its own ranks.

    Raises:
        RankFailure: it raised, or did not return within ``timeout`` seconds.
    """
    wake(None)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(
        target=_alone, args=(function, args, device_type(), theirs)
    )
    with forking_from(()):
        process.start()
    theirs.close()
    try:
        kind, detail = pickle.loads(ours.recv_bytes()) if ours.poll(timeout) else ("hung", "")
    except EOFError:
        kind, detail = "died", ""
    finally:
        process.kill()
        process.join()
    if kind != "returned":
        raise RankFailure(f"{function.__name__} {kind}\n{detail}")
    return detail


def run_script(path, num_processes=1, **variables):
    """The output of a script, run in its folder in one or several new processes, as torchrun would start them, with
    these environment ``variables``.

    Raises:
        RankFailure: a process failed, or did not end.
    """
    codes, printed, errors = script_outcome(path, [()] * num_processes, **variables)
    if codes != [0] * num_processes:
        raise RankFailure(f"exit codes {codes}\n{printed}{errors}")
    return printed


def script_outcome(path, arguments, timeout=300.0, **variables):
    """(exit codes, printed text, errors) of one process per element of ``arguments``, lists of words; the exit code is
    None for a process that did not end within ``timeout`` seconds.
    """
    wake(None)
    size = len(arguments)
    if size > 1:
        variables |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    context, deadline = multiprocessing.get_context("forkserver"), time.monotonic() + timeout
    processes = [
        context.Process(
            target=_script, args=(path, words, variables | ({"RANK": rank, "LOCAL_RANK": rank} if size > 1 else {}))
        )
        for rank, words in enumerate(arguments)
    ]
    try:
        for process in processes:
            with forking_from(()):
                process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    return codes, *(Path(f"{path}.{name}").read_text("utf-8") for name in OUTPUTS)


def _script(path, words, variables):
    end_with_parent()
    sys.path.insert(0, str(path.parent))
    os.chdir(path.parent)
    os.environ.update({name: str(value) for name, value in variables.items()})
    for number, name in enumerate(OUTPUTS, 1):
        os.dup2(os.open(f"{path}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def _alone(function, args, device, connection):
    end_with_parent()
    set_device_type(device)
    answer = answered(args[0], function, args[1:])
    connection.send_bytes(answer if isinstance(answer, bytes) else pickle.dumps(answer))
