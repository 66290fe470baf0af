"""Start both runs, follow them, and read the records of their ranks. No process or file outlives the command."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_cp.prove.ranks import Order, Run
from mindspeed_cp.prove.recording import Record

HOME = Path(__file__).resolve().parents[2]  # the folder from which mindspeed_cp can be imported
TAIL = 25  # lines of a log that are shown


class Failure(Exception):
    """A run failed.

    Args:
        run: name of the run.
        said: output of the rank that failed first.
    """

    def __init__(self, run: str, said: str) -> None:
        super().__init__(said)
        self.run, self.said = run, said


class Server:
    """A process that imports Megatron once and then forks the ranks of one order after another, all of one script.

    Args:
        folder: a temporary folder for files that the imports create.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "imports.log"
        self._file = open(self._log, "w", encoding="utf-8")
        self._process = subprocess.Popen(
            _command(), env=environment(folder, "cpu"), start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._file, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *failure: object) -> None:
        with suppress(BrokenPipeError):
            _input_of(self._process).close()
        _end(self._process)
        self._file.close()

    def run(self, order: Order, folder: Path, tell: Callable[[str, int], None]) -> None:
        """Run the order that is stored in ``folder``.

        Raises:
            Failure: a rank failed or did not end in time.
        """
        done = {}
        with suppress(BrokenPipeError):  # why the server has ended is reported below
            print(folder, file=_input_of(self._process), flush=True)
        for said in _lines(self._process):
            if "ended" in said:
                break
            if "statuses" in said:
                done[said["run"]] = said["statuses"]
            elif said["rank"] == 0:
                tell(said["run"], said["step"])
        for each in order.runs:
            if each.name not in done:
                raise Failure(each.name, tail(self._log))
            _check(each, done[each.name], folder)


def _input_of(process: "subprocess.Popen[str]") -> Any:
    assert process.stdin is not None
    return process.stdin


def run(
    order: Order, folder: Path, device: str, tell: Callable[[str, int], None], server: Server | None = None
) -> dict[str, list[Record]]:
    """Run an order: name of a run -> the records of its ranks.

    Args:
        folder: a temporary folder.
        tell: called with a run's name and the number of steps that its rank 0 has completed.
        server: a server for this script; None starts one. On a device no server is used.

    Raises:
        Failure: a rank failed or did not end in time.
    """
    order = replace(order, port=_free_ports())
    order.write(folder)
    if device == "cpu":
        with nullcontext(server) if server else Server(folder) as forking:
            forking.run(order, folder, tell)
    else:
        for each in order.runs:
            _started(order, each, folder, device, tell)
    records = {}
    for each in order.runs:
        records[each.name] = [
            torch.load(folder / f"{each.name}-{rank}.pt", weights_only=False) for rank in range(each.world)
        ]
    return records


def _check(run: Run, statuses: list[int | None], folder: Path) -> None:
    """Raise Failure with the output of a failed rank; one that ended by itself takes precedence over a timeout."""
    failed = [rank for rank, status in enumerate(statuses) if status != 0]
    if failed:
        ended = [rank for rank in failed if statuses[rank] is not None] or failed
        code = statuses[ended[0]]
        status = "did not end in time" if code is None else f"ended with status {code}"
        said = tail(folder / f"{run.name}-{ended[0]}.log")
        raise Failure(run.name, f"rank {ended[0]} of the run {run.name} {status}:\n{said}")


def _started(order: Order, run: Run, folder: Path, device: str, tell: Callable[[str, int], None]) -> None:
    """Start every rank as a separate process, because a process that uses a device cannot be forked."""
    logs = [open(folder / f"{run.name}-{rank}.log", "w", encoding="utf-8") for rank in range(run.world)]
    with _closing(logs):
        processes = [
            subprocess.Popen(
                _command(str(folder), run.name, str(rank)), env=environment(folder, device), start_new_session=True,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=logs[rank], text=True,
            )
            for rank in range(run.world)
        ]  # fmt: skip
        try:
            for said in _lines(processes[0]):
                tell(said["run"], said["step"])
            statuses: list[int | None] = []
            for process in processes:
                try:
                    statuses.append(process.wait(order.limit if not statuses else 30))
                except subprocess.TimeoutExpired:
                    statuses.append(None)
        finally:
            for process in processes:
                _end(process)
    _check(run, statuses, folder)


@contextmanager
def _closing(files: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for file in files:
            file.close()


def _command(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "mindspeed_cp.prove.ranks", *words]


def _end(process: "subprocess.Popen[str]") -> None:
    """Terminate a process that still runs, with its children; on SIGTERM it ends its own ranks."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            process.terminate()
            process.wait(10)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _lines(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(json.JSONDecodeError):  # output of a library
            said = json.loads(line)
            if isinstance(said, dict) and "run" in said:
                yield said


def environment(folder: Path, device: str) -> dict[str, str]:
    """The user's environment, without a launcher's variables, and with temporary files in ``folder``."""
    own = {"MINDSPEED_CP_DEVICE": device} if device == "cpu" else {}  # otherwise the machine's accelerator is used
    launcher = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT MINDSPEED_CP_DEVICE"
    left_out = {*launcher.split(), *(name for name in os.environ if "TORCHELASTIC" in name)}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = [kept.get("PYTHONPATH", ""), str(HOME)]
    fixed = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TMPDIR": str(folder),
        "WANDB_MODE": "disabled",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return kept | own | fixed


def tail(path: Path) -> str:
    """The end of a log: the last traceback or the last lines."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = [line for line in lines if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    return "\n".join(errors[-1:] or lines[-TAIL:]) or "it said nothing."


def _free_ports() -> int:
    """A port such that it and the next one are free, below the range of ephemeral ports."""
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise RuntimeError("no two ports are free")
