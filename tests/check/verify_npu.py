"""Every check of scripts/verify_npu.sh, which sources CANN's environment first; see there.

Each check is a command in a process of its own with a log of its own. What --quick runs comes first in a whole run too.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import processes
from verify_report import Outcome, last_line, report

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = {"cpu": 4, "cuda": 8, "npu": 8}


class Check(NamedTuple):
    """One row of the report.

    Args:
        command: a line of bash, in the repository's root, with {python}, {device}, {logs} and {runs} filled in; {runs}
            starts a part of verify_runs.py.
        quick: whether --quick runs it too.
        minutes: after which it is ended, and has failed.
    """

    name: str
    command: str
    quick: bool = False
    minutes: int = 60


PYTEST = "{python} -m pytest -q -p no:cacheprovider --device {device} --durations 3"
CHECKS = (
    Check("device and kernel", "{python} tests/check verify_machine {device}", True, 5),
    Check("operators, every block shape", f"{PYTEST} tests/kernels/test_kernel_{{kernel}}*.py", True),
    Check("parity of every algorithm", f"{PYTEST} tests/kernels/test_kernel_parity.py", True),
    Check("training, Ulysses and Ring", "{runs} algorithms {logs}/quick --quick", True),
    Check("performance, Ulysses and Ring", "{runs} performance {logs}/quick --quick", True),
    Check("kernel choice", f"{PYTEST} tests/kernels/test_kernel_select.py"),
    Check("parity over all features", f"{PYTEST} tests/attention/test_attention_exact.py"),
    Check(
        "launch scripts, dry run",
        "n=0; for s in scripts/launch/[!cd]*.sh; do DRY_RUN=1 PYTHON={python} bash $s || exit 1; n=$((n + 1)); done; "
        'echo "$n scripts"',
    ),
    Check("training, cp=1 with and without --use-flash-attn", "{runs} alone {logs}/whole"),
    Check("training, every algorithm", "{runs} algorithms {logs}/whole"),
    Check("training, KV cache policies", "{runs} policies {logs}/whole"),
    Check("training, sequence parallel, distributed optimizer, recompute, bf16", "{runs} modes {logs}/whole"),
    Check("training, packed documents, unaligned", "{runs} batches {logs}/whole"),
    Check("checkpoint and resume", "{runs} resume {logs}/resume"),
    Check("performance", "{runs} performance {logs}/whole", minutes=120),
)
MEGATRON = Check("Megatron-LM's own pretrain_gpt.py", "{runs} megatron {logs}/megatron --checkout {checkout}")
MINDSPEED = Check("attention beside MindSpeed's ring", "{runs} mindspeed {logs}/mindspeed")


def checks(args: argparse.Namespace) -> list[Check]:
    """Those that are asked for, and can run here; the first one describes the machine and always runs.

    Raises:
        ValueError: --only names a part of no check's name.
    """
    found = [*CHECKS, *([MEGATRON] if os.environ.get("MEGATRON_LM_PATH") else [])]
    found += [MINDSPEED] if args.device == "npu" and find_spec("mindspeed") else []
    found = [check for check in found if check.quick or not args.quick]
    for part in args.only:
        if not any(part in check.name for check in found):
            raise ValueError(f"--only {part!r} is part of no check's name; --list shows them.")
    return [c for c in found if c is CHECKS[0] or not args.only or any(part in c.name for part in args.only)]


def command_of(check: Check, args: argparse.Namespace, logs: Path) -> str:
    tiny = " --tiny" if args.device == "cpu" else ""
    runs = f"{sys.executable} tests/check verify_runs --ranks {args.ranks} --device {args.device}{tiny}"
    return check.command.format(
        python=sys.executable,
        device=args.device,
        kernel="cuda" if args.device == "cuda" else "npu",
        ranks=args.ranks,
        runs=runs,
        logs=logs,
        checkout=os.environ.get("MEGATRON_LM_PATH", ""),
    )


def run(check: Check, command: str, log: Path, minutes: float | None = None) -> Outcome:
    """Run one check, which is ended with all that it has started when its time is over.

    Args:
        minutes: instead of the check's own.
    """
    minutes = minutes or check.minutes
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        try:
            status = processes.run(
                ["bash", "-c", command], 60 * minutes, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT
            )
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
            file.write(f"\nended after {minutes:g} minutes\n")
    said = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(check.name, command, status == 0, time.monotonic() - start, said)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="verify_npu.sh", description=__doc__)
    parser.add_argument("--device", choices=list(RANKS), default="npu")
    parser.add_argument("--report", type=Path, help="the file to write; default: verify-DEVICE.md")
    parser.add_argument("--quick", action="store_true", help="the kernel, parity, Ulysses and Ring; ten minutes")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help="the checks with this in their name; may be repeated",
    )
    parser.add_argument(
        "--minutes", type=float, help="after which a check is ended, and has failed, instead of its own"
    )
    parser.add_argument("--list", action="store_true", help="show the checks and run none")
    args = parser.parse_args(argv)
    args.ranks = int(os.environ.get("RANKS", RANKS[args.device]))
    args.report = args.report or Path(f"verify-{args.device}.md")
    try:
        args.checks = checks(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logs = Path(tempfile.mkdtemp(prefix="verify-"))
    outcomes: list[Outcome] = []
    kind = ", ".join([*(["--quick"] if args.quick else []), *(f"--only {part!r}" for part in args.only)]) or "whole"
    for number, check in enumerate(args.checks):
        command = command_of(check, args, logs)
        if args.list:
            print(f"{check.name}: {command}")
            continue
        print(f"{check.name} ... ", end="", flush=True)
        outcomes.append(outcome := run(check, command, logs / f"{number}.log", args.minutes))
        print(f"{'pass' if outcome.passed else 'FAIL'} ({outcome.seconds:.0f} s) {last_line(outcome)}", flush=True)
        # After every check, so that a machine that goes down leaves what it had.
        args.report.write_text(report(args.device, args.ranks, kind, outcomes), encoding="utf-8")
    if args.list:
        return 0
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} checks passed; report: {args.report}; logs: {logs}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
