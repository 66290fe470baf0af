"""The command line of prove: parse the command, plan two small runs, start them, compare, and report."""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from mindspeed_cp.doctor import launch
from mindspeed_cp.patches.machine import choice as machine
from mindspeed_cp.prove import launching, report, shrinking
from mindspeed_cp.prove.comparing import compare
from mindspeed_cp.prove.limits import LIMITS, limits_of
from mindspeed_cp.prove.report import Verdict
from mindspeed_cp.prove.shrinking import Plan, Wish

DESCRIPTION = """\
Show on this machine, in minutes, whether a training command computes the same with context parallelism as without: it
is made small, runs twice with the same weights and the same data, and everything that can be compared is compared.
Exit status 0: equal; 1: different, or a run failed; 2: wrong use."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mindspeed-cp prove",
        description=DESCRIPTION,
        usage="%(prog)s [flags] SCRIPT.py ARGS...   (or: torchrun ... SCRIPT.py ARGS..., or a launch script)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cp", type=int, help="context-parallel size to compare with 1; default: 2, with two levels 4")
    add("--ranks", type=int, help="processes; pipeline and tensor parallelism are kept as far as they fit. Default: 4")
    add("--device", choices=("cpu", "npu", "cuda"), default="cpu", help="where both runs compute (default: cpu)")
    add("--dtype", choices=tuple(LIMITS), default="float32", help="precision of both runs (default: float32)")
    add("--steps", type=int, default=3, help="training steps (default: 3)")
    add("--seed", type=int, default=1234, help="of weights and data (default: 1234)")
    add("--real-sizes", action="store_true", help="do not make the model smaller")
    add(
        "--reference-only",
        action="store_false",
        dest="ours",
        help="the script's own context parallelism, without this project's",
    )
    add("--json", action="store_true", help="everything, machine-readable")
    add("--report", metavar="FILE", type=Path, help="write Markdown that can be pasted into an issue")
    add("--limit", type=float, default=600.0, help="seconds that a run may take (default: 600)")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def script_of(command: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """(script, its flags, variables that the command sets), from a Python script or a launch command.

    Raises:
        ValueError: it is neither, or the script does not exist.
    """
    if not command:
        raise ValueError("no script is given; write: mindspeed-cp prove pretrain_gpt.py ARGS...")
    if command[0].endswith(".py"):
        script, words, own = command[0], list(command[1:]), {}
    else:
        started = launch.read(shlex.join(command), os.environ)
        script, words, own = str(launch.home_of(started.script)), list(started.flags), started.environment
    if not Path(script).is_file():
        raise ValueError(f"{script} does not exist; give the path of a training script.")
    return str(Path(script).resolve()), words, own


def wish_of(given: argparse.Namespace) -> Wish:
    for flag, least in (("steps", 1), ("seed", 0)):
        if getattr(given, flag) < least:
            raise ValueError(f"--{flag} {getattr(given, flag)} must be at least {least}.")
    ranks = given.ranks or max(4, given.cp or 0)
    devices = machine.num_devices(given.device)
    if devices is not None and devices < ranks:
        raise ValueError(
            f"--device {given.device} needs a device for each of --ranks {ranks}, and torch sees {devices} here; "
            "give --ranks as many, or use --device cpu."
        )
    return Wish(**{each.name: getattr(given, each.name) for each in fields(Wish)} | {"ranks": ranks})


@contextmanager
def progress(plan: Plan, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A progress bar per run if rich is installed and stderr is a terminal, else one line per step; on stderr."""
    steps = plan.wish.steps
    if quiet:
        yield lambda name, step: None
        return
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda name, step: print(f"{name}: step {step} of {steps}", file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks = {run.name: bars.add_task(run.name, total=steps) for run in plan.runs}
        yield lambda name, step: bars.update(tasks[name], completed=step)


def proved(plan: Plan, server: launching.Server, tell: Callable[[str, int], None] = lambda name, step: None) -> Verdict:
    """Run both runs of the plan and compare them; arguments as for ``Server.run``."""
    start = time.monotonic()
    result = Verdict(
        Path(plan.alone.script).name,
        plan.ranks.cp,
        changed=plan.changed,
        uncovered=plan.uncovered,
        runs={run.name: (run.world, [run.script, *run.flags]) for run in plan.runs},
    )
    try:
        alone, shared = (server.run(run, tell) for run in plan.runs)
        result.comparison = compare(alone, shared, limits_of(plan.wish.dtype, plan.wish.device))
    except launching.Failure as failure:
        result.failure = str(failure)
    result.seconds = time.monotonic() - start
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if both runs are equal, 1 if they differ or failed, 2 for wrong use."""
    given = parser().parse_args(arguments)
    try:
        script, words, variables = script_of(given.command)
        os.environ.update(variables)
        wish = wish_of(given)
        with tempfile.TemporaryDirectory(prefix="mindspeed-cp-prove-") as name:
            plan = shrinking.plan(script, words, wish, Path(name))
            with progress(plan, given.json) as tell, launching.Server(Path(name), wish.device) as server:
                result = proved(plan, server, tell)
    except ValueError as error:
        print(f"mindspeed-cp prove: error: {error}", file=sys.stderr)
        return 2
    if given.report is not None:
        given.report.write_text(report.markdown(result), encoding="utf-8")
    with suppress(BrokenPipeError):
        print(json.dumps(report.as_json(result), indent=2) if given.json else report.text(result))
    return 0 if result.equal else 1
