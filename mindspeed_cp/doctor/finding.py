"""What a check says: one line, and where something is wrong, one line that says what to do."""

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "problem"]
MARKS: dict[Level, str] = {"ok": "ok", "note": "-", "warning": "!", "problem": "X"}


@dataclass(frozen=True)
class Finding:
    """One line on the screen.

    Args:
        level: "ok"; "note", worth knowing; "warning", works but likely not as wanted; "problem", does not work.
        text: what was found.
        todo: what to do; every warning and problem has it.
    """

    level: Level
    text: str
    todo: str = ""

    def __post_init__(self) -> None:
        assert self.todo or self.level in ("ok", "note"), f"nothing to do about {self.text!r}"

    def lines(self, width: int) -> list[str]:
        lines = textwrap.wrap(f"{MARKS[self.level]:>2} {self.text}", width, subsequent_indent="   ")
        if self.todo:
            # Not wrapped, so that it can be copied.
            lines.append(f"   -> {self.todo}")
        return lines


def split(message: str) -> tuple[str, str]:
    """Split an error of this project, which ends with a semicolon and a way out: (what is wrong, the way out)."""
    wrong, separator, way_out = message.rpartition("; ")
    if separator:
        return wrong, way_out
    return message, "follow the message above"


def problem(message: str) -> Finding:
    return Finding("problem", *split(message))


def has_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(finding) for finding in findings]
