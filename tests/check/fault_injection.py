"""Faults on purpose, for faults.py: one rank is killed, stopped or meets a full disk, at a phase.

A plan names the fault of every attempt. torchrun's agent, here inside this process with ranks forked from a server that
has imported everything, restarts the ranks after each, and the run must end with the losses of an undisturbed one.
"""

import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

VICTIM, STEP = 1, 3  # the rank and the step (counted from 1) that a fault meets
PHASES = ("groups", "data", "forward", "backward", "between", "shards", "latest")
IMPORTED = ("trainer.quiet", "mindspeed_cp.megatron_adaptor", "trainer.loop", "fault_injection")


@dataclass(frozen=True)
class Fault:
    """What happens to rank 1 at its step 3 (rank 0 for "latest", which it alone writes)."""

    kind: Literal["kill", "stop", "full disk"]
    phase: str

    @property
    def victim(self) -> int:
        return 0 if self.phase == "latest" else VICTIM


def run(argv: list[str], plan: Sequence[Fault], world_size: int, port: int, notes: Path) -> bool:
    """Train with ``argv``, attempt i disturbed by ``plan[i]``; returns whether the run came to its end.

    Args:
        notes: a folder for the time of each fault and for what the ranks print (rank 1 of attempt 0: "0-1.err").
    """
    import multiprocessing

    logging.disable(logging.ERROR)  # torch's agent would tell every restart in ten lines
    os.environ.update(OMP_NUM_THREADS="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server takes over no more than this
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.set_forkserver_preload(list(IMPORTED))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="faults",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0, "timeout": 60},
        max_restarts=len(plan),
        start_method="forkserver",
    )
    try:
        elastic_launch(config, train)(argv, list(plan), str(notes))
        return True
    except ChildFailedError:
        return False


def train(argv: list[str], plan: list[Fault], notes: str) -> None:
    """One rank of one attempt."""
    import torch
    from trainer.arguments import parse_args
    from trainer.failures import readable_failures, readable_flags
    from trainer.loop import pretrain

    torch.set_num_threads(1)
    rank, count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    sys.stdout = open(Path(notes, f"{count}-{rank}.out"), "w", encoding="utf-8")
    sys.stderr = open(Path(notes, f"{count}-{rank}.err"), "w", encoding="utf-8")
    with readable_flags():
        args = parse_args(argv)
    if count < len(plan) and rank == plan[count].victim:
        arm(plan[count], args.resume.iteration if args.resume else 0, Path(notes, f"fault-{count}.json"))
    note_first_step(Path(notes, f"first-step-{count}.json"))
    with readable_failures(rank):
        pretrain(args)


def note_first_step(note: Path) -> None:
    """Write the time at which this process ends its first step."""
    import trainer.loop

    step = trainer.loop.train_step

    def noted_step(*args):
        result = step(*args)
        if not note.exists():
            note.write_text(json.dumps(time.time()), encoding="utf-8")
        return result

    trainer.loop.train_step = noted_step


def arm(fault: Fault, first_step: int, note: Path) -> None:
    """Let ``fault`` happen when this process reaches its phase, at step 3 after ``first_step`` or in the next save."""
    import trainer.checkpoint
    import trainer.loop
    from megatron.core import parallel_state

    steps = [0]

    def strike():
        note.write_text(json.dumps({"time": time.time(), "step": first_step + steps[0]}), encoding="utf-8")
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:  # as on a full disk: the system refuses to let a file grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def before(owner, name: str, when: Callable[[], bool] = lambda: True):
        original = getattr(owner, name)

        def disturbed(*args, **options):
            if when():
                strike()
            return original(*args, **options)

        setattr(owner, name, disturbed)

    step = trainer.loop.train_step

    def counted_step(*args):
        steps[0] += 1
        return step(*args)

    trainer.loop.train_step = counted_step
    kernel = _kernel_class()
    {
        "groups": lambda: before(parallel_state, "initialize_model_parallel"),
        "data": lambda: before(trainer.loop, "build_model"),
        "forward": lambda: before(kernel, "forward", lambda: steps[0] == STEP),
        "backward": lambda: before(kernel, "backward", lambda: steps[0] == STEP),
        "between": lambda: before(trainer.loop, "train_step", lambda: steps[0] == STEP - 1),
        "shards": lambda: before(trainer.checkpoint.SynchronousSave, "save", lambda: steps[0] >= STEP),
        "latest": lambda: before(trainer.checkpoint, "complete", lambda: steps[0] >= STEP),
    }[fault.phase]()


def _kernel_class():
    from mindspeed_cp.kernels import select_kernel

    return type(select_kernel("cpu"))
