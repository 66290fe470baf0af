"""The ranks of a run. ``python -m mindspeed_cp.prove.ranks`` reads one ``Run`` after another from standard input, one
per line, starts its ranks and waits for them. It prints a line for every step, and last the ranks' exit statuses.

On the CPU it imports Megatron once and forks the ranks. On a device, which cannot be used after a fork, each rank is a
new process, ``... RUN``. Every rank writes its record and its output into the run's folder.
"""

import gc
import importlib
import importlib.util
import json
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-W", "ignore", "-m", "mindspeed_cp.prove.ranks")
GRACE = 10.0  # seconds that the other ranks of a run get after one has failed
# Modules that a script of Megatron-LM imports, and torch with its first optimizer; imported once, before the forks.
IMPORTS = ("megatron.training", "megatron.core.models.gpt", "megatron.core.optimizer", "torch._dynamo")
# Modules in the script's folder that are imported too, if the script's text mentions them.
BESIDE = ("trainer.loop", "model_provider", "gpt_builders", "mamba_builders", "hybrid_builders")
TESTS = "MINDSPEED_CP_PROVE_IMPORTS"  # modules that this command's tests import in every rank, before all others


@dataclass(frozen=True)
class Run:
    """One run of a script.

    Args:
        world: number of ranks.
        folder: a temporary folder for records, logs and other files.
        ours: whether this project's context parallelism is used, or the script's own.
        device: "cpu", "cuda" or "npu".
        limit: time limit in seconds.
    """

    name: str
    script: str
    flags: tuple[str, ...]
    world: int
    folder: str
    ours: bool = True
    device: str = "cpu"
    limit: float = 600.0

    def file(self, rank: int, ending: str) -> Path:
        """A rank's record (pt) or output (log)."""
        return Path(self.folder) / f"{self.name}-{rank}.{ending}"

    def line(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(line: str) -> "Run":
        return Run(**json.loads(line))


def prepare(run: Run) -> None:
    """Import the adaptor, then the Megatron modules that the script will import."""
    sys.path[0] = str(Path(run.script).resolve().parent)
    for name in filter(None, os.environ.get(TESTS, "").split(",")):
        importlib.import_module(name)
    if run.ours:
        import mindspeed_cp.megatron_adaptor  # noqa: F401  first, or Megatron is not patched
    elif run.device == "cpu":
        _stand_in()
    text = Path(run.script).read_text(encoding="utf-8", errors="replace")
    _import(IMPORTS)
    _import(name for name in BESIDE if name in text)


def _stand_in() -> None:
    """Redirect CUDA's functions to the CPU and change nothing else, to run unpatched Megatron on a CPU."""
    from mindspeed_cp.patches.checkout import without_checkout
    from mindspeed_cp.patches.machine import checkout, cpu, libraries, triton
    from mindspeed_cp.patches.manager import PatchManager
    from mindspeed_cp.patches.rows import patches_of

    PatchManager(patches_of([triton, cpu, libraries]) + patches_of([checkout], None, without_checkout)).apply()


def _import(names: Iterable[str]) -> None:
    """Import the modules that exist: with megatron-core alone there is no megatron.training."""
    for name in names:
        with suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name):
                importlib.import_module(name)


def live(run: Run, rank: int, tell: int) -> int:
    """Run the script as one rank of a run, save its record, and return its exit status.

    Args:
        tell: file descriptor to which rank 0 writes a line after every step.
    """
    import torch

    from mindspeed_cp.prove import watching
    from mindspeed_cp.prove.recording import Recorder

    os.environ["TMPDIR"] = run.folder
    tempfile.tempdir = None  # determined again on next use
    recorder = Recorder(*watching.layout(run.ours), lambda step: None if rank else _say(tell, run=run.name, step=step))
    status = 1
    try:
        with watching.watch(recorder):
            _run_script(run)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    torch.save(recorder.record, run.file(rank, "pt"))
    return status


def _run_script(run: Run) -> None:
    if run.ours:  # like python -m mindspeed_cp.run
        sys.argv[:] = ["-", run.script, *run.flags]
        runpy.run_module("mindspeed_cp.run", run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [run.script, *run.flags]
        runpy.run_path(run.script, run_name="__main__")


def _say(tell: int, **what: Any) -> None:
    os.write(tell, (json.dumps(what) + "\n").encode())


def _fork(run: Run, rank: int, port: int, tell: int) -> int:
    """Start a rank; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with suppress(OSError):  # the child has done so itself
            os.setpgid(pid, pid)
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        log = os.open(run.file(rank, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # this process's own input brings the next run
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run.world), LOCAL_WORLD_SIZE=str(run.world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        if run.device != "cpu":
            os.dup2(tell, 1)
            os.execv(sys.executable, [*COMMAND, run.line()])
        status = live(run, rank, tell)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = 1
    os._exit(status)


def _wait(children: Mapping[int, int], limit: float) -> dict[int, int | None]:
    """rank -> exit status, None for a rank that did not end in time; ranks that still run are killed.

    Args:
        children: process id, which is also the process group id -> rank.
    """
    ended: dict[int, int | None] = {}
    deadline = time.monotonic() + limit
    try:
        while len(ended) < len(children) and time.monotonic() < deadline:
            for pid, rank in children.items():
                if rank not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[rank] = os.waitstatus_to_exitcode(found[1])
                    if ended[rank]:
                        deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.02)
    finally:
        for pid, rank in children.items():
            with suppress(ProcessLookupError, PermissionError):  # the rank, or processes that it left behind
                os.killpg(pid, signal.SIGKILL)
            if rank not in ended:
                os.waitpid(pid, 0)
                ended[rank] = None
    return ended


def _free_port() -> int:
    """A free port below the range of ephemeral ports, which another process could get at any time."""
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is free")


def _carry_out(run: Run, tell: int) -> None:
    port = _free_port()
    statuses = _wait({_fork(run, rank, port, tell): rank for rank in range(run.world)}, run.limit)
    _say(tell, run=run.name, statuses=[statuses[rank] for rank in range(run.world)])


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, _leave)
    tell = os.dup(1)
    os.dup2(2, 1)
    if words:
        run = Run.read(words[0])
        prepare(run)
        return live(run, int(os.environ["RANK"]), tell)
    for number, line in enumerate(sys.stdin):
        run = Run.read(line)
        if number == 0 and run.device == "cpu":
            prepare(run)
            gc.freeze()  # otherwise garbage collection in a rank would copy the pages of all imported modules
        _carry_out(run, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
