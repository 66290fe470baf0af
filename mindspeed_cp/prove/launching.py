"""Start the ranks of runs, follow them, and read their records. No process or file outlives the command."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mindspeed_cp.prove.ranks import COMMAND, Run
from mindspeed_cp.prove.recording import Record

HOME = Path(__file__).resolve().parents[2]  # the folder from which mindspeed_cp can be imported
TAIL = 25  # lines of a log that are shown


class Failure(Exception):
    """A run failed; the message is what the rank that failed first printed."""


class Server:
    """A process that starts the ranks of one run after another, all of one script. On the CPU it imports Megatron once.

    Args:
        folder: a temporary folder for files that the imports create.
        device: of all runs.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._log = folder / "imports.log"
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                COMMAND, env=environment(folder, device), start_new_session=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *failure: object) -> None:
        """End the process, which on SIGTERM ends its ranks."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError), self._process:  # closes its pipes
            pass

    def run(self, run: Run, tell: Callable[[str, int], None]) -> list[Record]:
        """The records of a run's ranks.

        Args:
            tell: called with the run's name and the number of steps that its rank 0 has completed.

        Raises:
            Failure: a rank failed, did not end in time, or trained nothing.
        """
        with suppress(BrokenPipeError):  # why the server has ended is reported below
            print(run.line(), file=self._process.stdin, flush=True)
        for said in self._lines():
            if "statuses" in said:
                break
            tell(run.name, said["step"])
        else:
            raise Failure(tail(self._log))
        return records_of(run, said["statuses"])

    def _lines(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(json.JSONDecodeError):  # output of a library
                said = json.loads(line)
                if isinstance(said, dict) and "run" in said:
                    yield said


def records_of(run: Run, statuses: Sequence[int | None]) -> list[Record]:
    """The records of a run's ranks.

    Args:
        statuses: exit status of each rank, None if it did not end in time.

    Raises:
        Failure: with the output of a failed rank; one that ended by itself takes precedence over a timeout.
    """
    failed = [rank for rank, status in enumerate(statuses) if status != 0]
    if failed:
        first = next((rank for rank in failed if statuses[rank] is not None), failed[0])
        status = "did not end in time" if statuses[first] is None else f"ended with status {statuses[first]}"
        raise Failure(f"rank {first} of the run {run.name} {status}:\n{tail(run.file(first, 'log'))}")
    records = [torch.load(run.file(rank, "pt"), weights_only=False) for rank in range(run.world)]
    if not all(record.steps for record in records):
        raise Failure(
            f"the run {run.name} ended without a training step by Megatron's schedules; give a script that trains with "
            "megatron.core.pipeline_parallel.get_forward_backward_func."
        )
    return records


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
    """The end of a log: the last error of a parser, or the last lines."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = [line for line in lines if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    return "\n".join(errors[-1:] or lines[-TAIL:]) or "it said nothing."
