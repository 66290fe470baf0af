"""Runs functions in real process groups: ``run_ranks(4, function, *args)`` calls ``function(rank, *args)`` on four
ranks.

Ranks start once per world size and serve many calls (a pool), because a start costs more than a case. They are forked
from a server that has already imported torch. After any failure the pool is replaced, so no call inherits a half-sent
message. A call never hangs: a rank that does not answer within the timeout is killed, and the error shows its stack.
"""

import faulthandler
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from unittest.mock import patch

from rank_server import IMPORTS, end_with_parent

GRACE = 3.0  # seconds that the other ranks get to finish after one has failed
# Includes modules that torch imports with its first optimizer or deterministic algorithm, seconds in every rank.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._inductor.config",
    "pytest",
    "hypothesis",
)

_pools, _servers = {}, {}
_awake = None  # the pool whose ranks are not stopped
_device_type = "cpu"


def set_device_type(device_type):
    """Set the device type of this session's ranks; pytest's option --device calls it once."""
    global _device_type
    _device_type = device_type


def device_type():
    return _device_type


@dataclass(frozen=True)
class Outcome:
    """How one rank ended a call.

    Args:
        kind: "returned", "raised", "died" or "hung".
        detail: its value, traceback, exit code or stack.
    """

    kind: str
    detail: object
    seconds: float


class RankFailure(AssertionError):
    """At least one rank raised, died or hung; the message holds every rank's traceback or stack."""


@contextmanager
def forking_from(imported):
    """Context manager: processes are forked from a server that has imported torch and then the modules ``imported``.

    There is one server per list, because imports that change torch must not affect other ranks.
    """
    if imported not in _servers:
        _servers[imported] = forkserver.ForkServer()
        _servers[imported].set_forkserver_preload(["rank_server"])
    # The server starts at its first use and inherits the environment but not sys.path.
    names = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), IMPORTS: " ".join([*PRELOAD, *imported])}
    with (
        patch.dict(os.environ, names),
        patch.object(forkserver, "connect_to_new_process", _servers[imported].connect_to_new_process),
    ):
        yield


class RankPool:
    """``world_size`` processes in a process group that wait for calls."""

    def __init__(self, world_size, group_timeout=60.0, leave_after_failure=False, imported=()):
        context = multiprocessing.get_context("forkserver")
        self.world_size, self.folder = world_size, tempfile.mkdtemp(prefix="ranks-")
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                daemon=True,
                args=(rank, world_size, self.folder, _device_type, group_timeout, leave_after_failure, theirs),
            )
            with forking_from(imported):
                process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, function, args, timeout, grace):
        """Outcomes of all ranks, in rank order; after the first failure the others get ``grace`` seconds."""
        payload, start, outcomes = pickle.dumps((function, args)), time.monotonic(), {}
        for connection in self.connections:
            try:
                connection.send_bytes(payload)
            except OSError:
                pass  # the rank is dead, as its outcome below says
        deadline = start + timeout
        while len(outcomes) < self.world_size:
            pending = [rank for rank in range(self.world_size) if rank not in outcomes]
            ready = wait([self.connections[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
            for rank in pending:
                if self.connections[rank] in ready:
                    outcomes[rank] = self._receive(rank, time.monotonic() - start)
                    if outcomes[rank].kind != "returned":
                        deadline = min(deadline, time.monotonic() + grace)
            if not ready:
                for rank, stack in self._stacks(pending).items():
                    outcomes[rank] = Outcome("hung", stack, time.monotonic() - start)
        return [outcomes[rank] for rank in range(self.world_size)]

    def _receive(self, rank, seconds):
        try:
            kind, detail = pickle.loads(self.connections[rank].recv_bytes())
            return Outcome(kind, detail, seconds)
        except (EOFError, OSError):
            # The pipe closes before the process is reaped, so wait for its exit code.
            self.processes[rank].join()
            return Outcome("died", f"exit code {self.processes[rank].exitcode}", seconds)

    def _stacks(self, ranks):
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)
        stacks = {}
        for rank in ranks:
            with open(os.path.join(self.folder, f"stack-{rank}"), encoding="utf-8") as file:
                stacks[rank] = file.read()
        return stacks

    def signal(self, number):
        for process in self.processes:
            if process.is_alive():
                with suppress(ProcessLookupError):  # it may have ended
                    os.kill(process.pid, number)

    def close(self):
        self.signal(signal.SIGCONT)
        for connection in self.connections:
            connection.close()  # an idle rank sees the end of its pipe and exits
        for process in self.processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(rank, world_size, folder, device, group_timeout, leave_after_failure, connection):
    """Run one rank: it joins the group and answers calls until the pipe closes."""
    from mindspeed_cp.doctor.meeting import join

    end_with_parent()
    set_device_type(device)  # the server from which it is forked has not read pytest's options
    # On SIGUSR1 this rank writes its stack to a file for the parent.
    faulthandler.register(signal.SIGUSR1, open(os.path.join(folder, f"stack-{rank}"), "w", encoding="utf-8"))
    join(rank, world_size, device, folder, group_timeout)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the pipe is closed; all ranks exit, so the process group need not be destroyed
        except Exception:
            answer = ("raised", traceback.format_exc())
        else:
            answer = answered(rank, function, args)
        try:
            connection.send_bytes(answer if isinstance(answer, bytes) else pickle.dumps(answer))
        except OSError:
            os._exit(0)
        if leave_after_failure and not isinstance(answer, bytes):
            os._exit(1)


def answered(rank, function, args):
    """Pickled bytes of a value, or a (kind, traceback) pair of a failure."""
    try:
        return pickle.dumps(("returned", function(rank, *args)))
    except BaseException:
        return "raised", traceback.format_exc()


def wake(pool=None):
    """Resume the ranks of this pool and stop those of the previous one (SIGSTOP); None stops all.

    Idle ranks use CPU time: every gloo group has threads that poll a hundred times a second, and those of all pools
    together took half a core.
    """
    global _awake
    if pool is not _awake:
        if _awake is not None:
            _awake.signal(signal.SIGSTOP)
        if pool is not None:
            pool.signal(signal.SIGCONT)
        _awake = pool


def run_ranks(world_size, function, *args, timeout=120.0, fresh=False, imported=()):
    """Call ``function(rank, *args)`` on every rank of a group and return the values in rank order.

    Args:
        function: importable by name; its results must be picklable.
        timeout: seconds for the call; then the ranks are killed, and RankFailure shows their stacks.
        fresh: use new processes and end them afterwards, for functions that change their process.
        imported: names of modules that these new processes have already imported, in this order.

    Raises:
        RankFailure: a rank raised, died or did not answer; the other ranks are killed.
    """
    wake(None if fresh else _pools.get(world_size))
    pool = RankPool(world_size, imported=imported) if fresh else _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = RankPool(world_size)
        wake(pool)
    outcomes = None
    try:
        outcomes = pool.call(function, args, timeout, GRACE)
    finally:
        failed = outcomes is None or any(outcome.kind != "returned" for outcome in outcomes)
        if failed or fresh:
            if not fresh:
                wake(None)
                del _pools[world_size]
            pool.close()
    if failed:
        raise RankFailure(_describe(outcomes))
    return [outcome.detail for outcome in outcomes]


def free_port():
    """A free port below the ephemeral range, from which other tests may take ports before this one is used."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError("no port is free")


def _describe(outcomes):
    """A text with every distinct failure and the ranks that had it."""
    failures = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.kind != "returned":
            failures.setdefault((outcome.kind, outcome.detail), []).append(rank)
    return "\n".join(
        f"---- rank {', '.join(map(str, ranks))} of {len(outcomes)} {kind} after {outcomes[ranks[0]].seconds:.1f} "
        f"s\n{detail}"
        for (kind, detail), ranks in failures.items()
    )


def observe_ranks(world_size, function, *args, timeout=60.0, group_timeout=60.0, leave_after_failure=True, imported=()):
    """Like ``run_ranks`` in fresh processes, but returns every rank's Outcome, and no rank is killed early.

    ``leave_after_failure``: a rank that raised exits, as a training script does; otherwise it stays without answering.
    """
    wake(None)
    pool = RankPool(world_size, group_timeout, leave_after_failure, imported)
    try:
        return pool.call(function, args, timeout, grace=timeout)
    finally:
        pool.close()


def close_pools():
    """End all ranks; pytest calls it when the session finishes."""
    wake(None)
    while _pools:
        _pools.popitem()[1].close()
