"""The result of a check: one line, and if something is wrong, one more line that says what to do."""

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "problem"]
MARKS: dict[Level, str] = {"ok": "ok", "note": "-", "warning": "!", "problem": "X"}


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Args:
        level: "ok"; "note", worth knowing; "warning", works but probably not as intended; "problem", does not work.
        text: what was found.
        todo: what to do; required for warnings and problems.
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
    """Split an error message of this project at its last semicolon: (what is wrong, what to do)."""
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
