"""The result of prove as text, as Markdown for an issue, and as JSON."""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_cp.prove import signature
from mindspeed_cp.prove.comparing import Comparison

SHOWN = 6  # module names of a list that are shown
WIDTH = 110
QUANTITIES = ("weight", "output", "gradient", "loss", "gradient norm", "tokens")
TITLES = {
    "weight": "initial weights",
    "positions": "tokens of the ranks",
    "output": "module outputs",
    "gradient": "gradients",
    "loss": "losses",
    "gradient norm": "gradient norms",
    "tokens": "token counts",
}


@dataclass
class Verdict:
    """The result of a proof.

    Args:
        comparison: None if a run failed; ``failure`` then says how.
        changed: what was shrunk or removed, one line each.
        uncovered: what the runs do not test, one line each.
        title: the script, or another name of what was run.
        runs: name of a run -> (ranks, command line).
    """

    title: str
    cp: int
    comparison: Comparison | None = None
    failure: str = ""
    changed: Sequence[str] = ()
    uncovered: Sequence[str] = ()
    runs: dict[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        return self.comparison is not None and self.comparison.equal

    @property
    def not_covered(self) -> list[str]:
        """What was not tested, and what could not be compared."""
        return [*self.uncovered, *(_not_compared(self.comparison) if self.comparison else [])]


def text(verdict: Verdict) -> str:
    """One screen."""
    lines = [_headline(verdict)]
    if verdict.comparison is None:
        lines += ["", *verdict.failure.splitlines()]
    else:
        lines += ["", *(f"  {line}" for line in _table(verdict.comparison))]
        if not verdict.equal:
            lines += ["", *_found(verdict.comparison)]
    for title, said in (("Shrunk:", verdict.changed), ("Not covered:", verdict.not_covered)):
        if said:
            lines += ["", title, *(f"  {line}" for line in said)]
    return "\n".join(wrapped for line in lines for wrapped in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False) or [""]


def _headline(verdict: Verdict) -> str:
    seconds = f" ({verdict.seconds:.0f} s)" if verdict.seconds else ""
    if verdict.comparison is None:
        return f"NOT SHOWN: {verdict.title}: a run failed{seconds}"
    word = "EQUAL" if verdict.equal else "DIFFERENT"
    return f"{word}: {verdict.title}: cp={verdict.cp} against cp=1{seconds}"


def _table(comparison: Comparison) -> list[str]:
    largest = comparison.limits.largest
    lines = []
    for what in QUANTITIES:
        count = comparison.counted.get(what)
        if not count:
            continue
        wrong = sum(difference.what == what for difference in comparison.differences)
        state = "equal" if not wrong else f"{wrong} differ"
        error = f"largest error {comparison.worst[what]:.1e}, limit {largest[what]:.0e}" if what in largest else ""
        lines.append(f"{TITLES[what]:<24} {count:>5}  {state:<12} {error}".rstrip())
    for step, (one, many) in enumerate(comparison.losses[:4]):
        norms = comparison.grad_norms[step] if step < len(comparison.grad_norms) else None
        norm = f"   gradient norm {norms[0]:.7g} | {norms[1]:.7g}" if norms else ""
        lines.append(f"step {step + 1}: loss {one:.9g} | {many:.9g}{norm}")
    return lines


def _found(comparison: Comparison) -> list[str]:
    """The first difference of each kind, with its signature."""
    lines = []
    for what, words in (
        ("weight", "The weights are not the same at the start; the first is"),
        ("positions", "The ranks do not hold every token once:"),
        ("output", "The first module whose output differs is"),
        ("gradient", "The first parameter in backward whose gradient differs is"),
    ):
        difference = comparison.first(what)
        if difference is None:
            continue
        kind = f" ({difference.kind})" if difference.kind else ""
        by = f", off by {difference.error:.2g}" if what in ("output", "gradient") else ""
        lines.append(f"{words} {difference.name}{kind}{by}.")
        seen = signature.of(difference, comparison)
        if seen is not None:
            lines.append(f"  {seen.kind}: {seen.seen}." + (f" Look at {seen.look}." if seen.look else ""))
    if not lines:
        steps = ", ".join(f"{each.what} of {each.name}" for each in comparison.differences[:SHOWN])
        lines = [f"Outputs and gradients of step 1 are equal; what differs is {steps}."]
    return lines


def markdown(verdict: Verdict) -> str:
    """A report that can be pasted into an issue."""
    lines = [f"### mindspeed-cp prove: {_headline(verdict)}", "", "```text", text(verdict), "```"]
    if verdict.comparison is not None and not verdict.equal:
        lines += ["", "| what | name | error |", "|---|---|---|"]
        lines += [f"| {each.what} | `{each.name}` | {each.error:.2e} |" for each in verdict.comparison.differences[:20]]
    for name, (world, words) in verdict.runs.items():
        lines += ["", f"Run {name}, {world} ranks:", "", "```bash", shlex.join(words), "```"]
    return "\n".join(lines) + "\n"


def as_json(verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = {
        "equal": verdict.equal,
        "script": verdict.title,
        "context_parallel_size": verdict.cp,
        "failure": verdict.failure,
        "shrunk": list(verdict.changed),
        "not_covered": verdict.not_covered,
        "seconds": round(verdict.seconds, 1),
        "commands": {name: list(words) for name, (_, words) in verdict.runs.items()},
    }
    comparison = verdict.comparison
    if comparison is None:
        return found
    return found | {
        "compared": comparison.counted,
        "limits": {what: limit for what, limit in comparison.limits.largest.items() if what in comparison.counted},
        "largest_error": {what: _number(error) for what, error in comparison.worst.items()},
        "not_compared": comparison.apart,
        "documents": comparison.documents,
        "losses": comparison.losses,
        "gradient_norms": comparison.grad_norms,
        "first_module": _described(comparison, "output"),
        "first_parameter": _described(comparison, "gradient"),
        "differences": [
            {"what": each.what, "name": each.name, "error": _number(each.error)} for each in comparison.differences
        ],
    }


def _described(comparison: Comparison, what: str) -> dict[str, Any] | None:
    """The first difference of a kind."""
    difference = comparison.first(what)
    if difference is None:
        return None
    seen = signature.of(difference, comparison)
    return {
        "name": difference.name,
        "class": difference.kind,
        "error": _number(difference.error),
        "signature": seen.kind if seen else None,
        "seen": seen.seen if seen else None,
    }


def _number(value: float) -> float | None:
    return value if value - value == 0 else None  # JSON has no infinity


def _not_compared(comparison: Comparison) -> list[str]:
    lines = []
    if comparison.apart:
        names = list(dict.fromkeys(comparison.apart))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"outputs that are not one row for each token in both runs: {names[0]}{more}")
    if comparison.documents <= 1:
        lines.append("document boundaries: the first batch has none")
    return lines
