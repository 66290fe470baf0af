"""The ranks of both runs. ``python -m mindspeed_cp.prove.ranks`` imports Megatron once, reads names of FOLDERs from
standard input, one per line, and forks all ranks of each order, run after run. ``... FOLDER RUN RANK`` is one rank, for
devices, which cannot be used after a fork.

FOLDER/order.json says what to run (``Order``); each rank writes FOLDER/RUN-RANK.pt and .log, and prints one line per
step. A last line says that the order has ended.
"""

import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRACE = 10.0  # seconds that the other ranks of a run get after one has failed
# Modules that a script of Megatron-LM imports, and torch with its first optimizer; imported once, before the forks.
IMPORTS = ("megatron.training", "megatron.core.models.gpt", "megatron.core.optimizer", "torch._dynamo")
# Modules in the script's folder that are imported too, if the script's text mentions them.
BESIDE = ("trainer.loop", "model_provider", "gpt_builders", "mamba_builders", "hybrid_builders")
TESTS = "MINDSPEED_CP_PROVE_IMPORTS"  # modules that this command's tests import in every rank, before all others


@dataclass(frozen=True)
class Run:
    """One run: name, number of ranks, the script's flags."""

    name: str
    world: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """A script and its two runs.

    Args:
        ours: whether this project's context parallelism is used, or the script's own.
        limit: time limit of a run in seconds.
        port: the first run's port; the second run uses the next one.
    """

    script: str
    runs: tuple[Run, ...]
    ours: bool = True
    limit: float = 600.0
    port: int = 0

    def write(self, folder: Path) -> None:
        (folder / "order.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "Order":
        found = json.loads((folder / "order.json").read_text(encoding="utf-8"))
        runs = tuple(Run(run["name"], run["world"], tuple(run["flags"])) for run in found.pop("runs"))
        return Order(runs=runs, **found)


def prepare(order: Order) -> None:
    """Import the adaptor, then the Megatron modules that the script will import."""
    sys.path[0] = str(Path(order.script).resolve().parent)
    for name in filter(None, os.environ.get(TESTS, "").split(",")):
        importlib.import_module(name)
    if order.ours:
        import mindspeed_cp.megatron_adaptor  # noqa: F401  first, or Megatron is not patched
    elif os.environ.get("MINDSPEED_CP_DEVICE") == "cpu":
        _stand_in()
    text = Path(order.script).read_text(encoding="utf-8", errors="replace")
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


def live(order: Order, run: Run, rank: int, folder: Path, tell: int) -> int:
    """Run the script as one rank of a run, save its record, and return its exit status.

    Args:
        tell: file descriptor to which a line is written after every step.
    """
    import torch

    from mindspeed_cp.prove import watching
    from mindspeed_cp.prove.recording import Recorder

    _meet(run, rank, order.port + [each.name for each in order.runs].index(run.name))
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # determined again on next use
    positions = watching.our_positions if order.ours else watching.their_positions
    in_place = {"in_place": watching.our_rows} if order.ours else {}
    recorder = Recorder(positions, lambda step: _say(tell, run=run.name, rank=rank, step=step), **in_place)
    status = 1
    try:
        watching.watch(recorder)
        _run_script(order, run)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    path = folder / f"{run.name}-{rank}.pt"
    torch.save(recorder.record, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return status


def _meet(run: Run, rank: int, port: int) -> None:
    size = str(run.world)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def _run_script(order: Order, run: Run) -> None:
    if order.ours:  # like python -m mindspeed_cp.run
        sys.argv[:] = ["-", order.script, *run.flags]
        runpy.run_module("mindspeed_cp.run", run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [order.script, *run.flags]
        runpy.run_path(order.script, run_name="__main__")


def _say(tell: int, **what: Any) -> None:
    os.write(tell, (json.dumps(what) + "\n").encode())


def _fork(order: Order, run: Run, rank: int, folder: Path, tell: int) -> int:
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
        log = os.open(folder / f"{run.name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = live(order, run, rank, folder, tell)
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


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _carry_out(order: Order, folder: Path, tell: int) -> None:
    """Run both runs of an order, stopping at the first that fails."""
    for run in order.runs:
        children = {_fork(order, run, rank, folder, tell): rank for rank in range(run.world)}
        statuses = _wait(children, order.limit)
        _say(tell, run=run.name, statuses=[statuses[rank] for rank in range(run.world)])
        if any(statuses.values()):
            break
    _say(tell, run="", ended=True)


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, _leave)
    tell = os.dup(1)
    os.dup2(2, 1)
    if words:
        folder = Path(words[0])
        order = Order.read(folder)
        prepare(order)
        run = next(run for run in order.runs if run.name == words[1])
        return live(order, run, int(words[2]), folder, tell)
    prepared = False
    for line in sys.stdin:
        folder = Path(line.strip())
        order = Order.read(folder)
        if not prepared:
            prepare(order)
            gc.freeze()  # otherwise garbage collection in a rank would copy the pages of all imported modules
            prepared = True
        _carry_out(order, folder, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
