"""The report of scripts/verify_npu.sh: one file, complete, so that nobody has to ask for a second mail."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

LONGEST_LINE = 160  # of a check's last line in the table
SHOWN = 150  # lines of a failed check, from its end
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Outcome(NamedTuple):
    """What a check gave; ``said`` is its whole output."""

    name: str
    command: str
    passed: bool
    seconds: float
    said: str

    @property
    def lines(self) -> list[str]:
        return [line for line in ESCAPES.sub("", self.said).splitlines() if line.strip()]


def last_line(outcome: Outcome) -> str:
    return outcome.lines[-1][:LONGEST_LINE] if outcome.lines else ""


def report(device: str, ranks: int, kind: str, outcomes: Sequence[Outcome]) -> str:
    """The text of the file.

    Args:
        ranks: devices of the training runs.
        kind: which checks were asked for, such as "whole".
    """
    return "\n".join(
        [*_head(device, ranks, kind, outcomes), *_table(outcomes), *_tables(outcomes), *_failures(outcomes)]
    )


def _head(device: str, ranks: int, kind: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    failed = sum(not outcome.passed for outcome in outcomes)
    yield f"# mindspeed_cp on {device}: {f'{failed} failed' if failed else 'pass'}"
    yield ""
    spent = sum(outcome.seconds for outcome in outcomes) / 60
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    yield f"{now}, {kind}, {ranks} ranks, {spent:.0f} minutes, {_revision()}"
    yield from ("", "## Machine", "", "```text")
    # The first check describes the machine, in a process of its own: none of the devices stays taken.
    yield from outcomes[0].lines
    yield from ("```", "")


def _revision() -> str:
    place = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", place, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"revision {done.stdout.strip() or 'unknown'}, {Path(sys.executable)}"


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield from ("## Checks", "", "| check | result | time | last line |", "|---|---|---|---|")
    for outcome in outcomes:
        result = "pass" if outcome.passed else "**FAIL**"
        yield f"| {outcome.name} | {result} | {outcome.seconds:.0f} s | {last_line(outcome).replace('|', '/')} |"
    yield ""


def _tables(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What the checks measured: each line of the trainings, and the tables of speed."""
    for outcome in outcomes:
        rows = [line for line in outcome.lines if line.startswith("|")]
        if rows:
            sizes = next((line for line in outcome.lines if "tokens, for" in line), "")
            yield from (f"## {outcome.name}", "", sizes, "", *rows, "")
        elif outcome.name.startswith("training"):
            found = [
                line for line in outcome.lines if re.match(r"[\w ,=-]+: (skipped|failed|equal|DIFFERENT|\d)", line)
            ]
            yield from (f"## {outcome.name}", "", *(f"* {line}" for line in found), "")


def _failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        if not outcome.passed:
            yield from (
                f"## Failed: {outcome.name}",
                "",
                "```text",
                f"$ {outcome.command}",
                *outcome.lines[-SHOWN:],
                "```",
                "",
            )
