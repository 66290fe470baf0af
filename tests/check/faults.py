"""Break a training run on purpose: fault x phase x outcome x time, as a table.

    python tests/check faults [--phases forward shards] [--kinds kill stop "full disk"] [--markdown]

Two ranks train twelve steps on the Ring, with a checkpoint every second step. In each row one rank is killed (kill
-9), stopped (kill -STOP) or can write no more, at one phase; torchrun's agent restarts both, and the resumed run must
end with the losses of an undisturbed one, bit by bit. Exit status 1 where it does not.
"""

import trainer.quiet  # noqa: F401  before Megatron warns

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import free_port
from compare_runs import read_run
from fault_injection import PHASES, Fault, run

NUM_STEPS = 12
COLUMNS = ("fault", "phase", "outcome", "step of the fault", "resumed at", "seconds to the next step")
# 0.15 minutes: after so long a rank gives up on one that is silent.
FLAGS = (
    f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 2 --lr 5e-3 "
    f"--train-iters {NUM_STEPS} --save-interval 2 --hidden-dropout 0.1 --context-parallel-size 2 --use-flash-attn "
    f"--context-parallel-algo megatron_cp_algo --use-cp-send-recv-overlap --distributed-timeout-minutes 0.15"
).split()


def train(prefix: str, folder: Path, plan: list[Fault]) -> tuple[bool, dict[int, float]]:
    """(whether the run came to its end, its losses); what the ranks printed stays in ``folder``."""
    folder.mkdir()
    flags = [*FLAGS, "--data-path", prefix, "--save", str(folder / "ck"), "--load", str(folder / "ck")]
    log = folder / "run.jsonl"
    ended = run([*flags, "--log-file", str(log)], plan, 2, free_port(), folder)
    return ended, losses(log) if log.is_file() else {}


def losses(path: Path) -> dict[int, float]:
    """step -> loss of a --log-file."""
    return {record["iteration"]: record["loss"] for record in read_run(path)}


def rows_of(plan: list[Fault], prefix: str, folder: Path, wanted: dict[int, float]) -> list[tuple[str, ...]]:
    """One row for each fault of a run that meets them one after the other."""
    ended, got = train(prefix, folder, plan)
    outcome = (
        "same losses, bit by bit" if ended and got == wanted else "OTHER LOSSES" if ended else "ENDED WITH AN ERROR"
    )
    return [row_of(fault, folder, attempt, outcome) for attempt, fault in enumerate(plan)]


def row_of(fault: Fault, folder: Path, attempt: int, outcome: str) -> tuple[str, ...]:
    note, first = folder / f"fault-{attempt}.json", folder / f"first-step-{attempt + 1}.json"
    if not note.is_file():
        return fault.kind, fault.phase, "THE FAULT DID NOT HAPPEN", "-", "-", "-"
    struck = json.loads(note.read_text(encoding="utf-8"))
    output = folder / f"{attempt + 1}-0.out"
    said = output.read_text(encoding="utf-8") if output.is_file() else ""
    resumed = said.partition("iter_")[2][:7].lstrip("0") or "the start"
    seconds = f"{json.loads(first.read_text(encoding='utf-8')) - struck['time']:.1f}" if first.is_file() else "-"
    return fault.kind, fault.phase, outcome, str(struck["step"]), resumed, seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    kinds = ["kill", "stop", "full disk"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--together", action="store_true", help="one run meets all faults, one after the other")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/reliability.md has it")
    parser.add_argument("--keep", action="store_true", help="keep the folder with what the ranks printed, and name it")
    args = parser.parse_args(argv)
    from prepare_data import main as prepare_data

    # A full disk is met where something is written.
    faults = [
        Fault(kind, phase)
        for kind in args.kinds
        for phase in args.phases
        if kind != "full disk" or phase in ("shards", "latest")
    ]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        prefix = str(folder / "topics")
        prepare_data(["--output", prefix])
        ended, wanted = train(prefix, folder / "undisturbed", [])
        if not ended or len(wanted) != NUM_STEPS:
            sys.stderr.write((folder / "undisturbed/0-0.err").read_text(encoding="utf-8"))
            return 1
        plans = [faults] if args.together else [[fault] for fault in faults]
        rows = []
        for index, plan in enumerate(plans):
            rows += rows_of(plan, prefix, folder / f"case-{index}", wanted)
            print(f"{len(rows)} of {len(faults)}: {', '.join(rows[-1])}", file=sys.stderr, flush=True)
    finally:
        if args.keep:
            print(f"what the ranks printed: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print_table(rows, args.markdown)
    return 0 if all("bit by bit" in row[2] for row in rows) else 1


def print_table(rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows)))
        return
    table = Table(title="Two ranks, Ring, 12 steps, a checkpoint every second step")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
