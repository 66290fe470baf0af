"""The diffs of CONTRIBUTING.md, which tests apply to check that the page is right."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def diff_of(what):
    """file -> text that the diff below "## How to add ``what``" adds to it, without its indentation.

    Raises:
        ValueError: the page has no such diff, or a context line of the diff is not in the file.
    """
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## How to add {what}\n")[2].partition("\n## ")[0]
    found = re.search(r"\n *```diff\n(.*?)\n *```", section, re.DOTALL)
    if found is None:
        raise ValueError(f"CONTRIBUTING.md has no diff of how to add {what}")
    added, name, before = {}, "", ""
    for line in textwrap.dedent(found[1]).splitlines():
        if line.startswith("+++ "):
            name = line[4:]
            added[name], before = "", (ROOT / name).read_text("utf-8") if (ROOT / name).is_file() else ""
        elif line.startswith("+"):
            added[name] += f"{line[1:]}\n"
        elif f"\n{line[1:]}" not in before:
            raise ValueError(f"{name} has no line that begins with {line[1:]!r}")
    return {name: textwrap.dedent(text) for name, text in added.items()}


def row_of(what, file, module):
    """The value of the row that the diff adds to a table of ``file``, evaluated in ``module``: (name, row), or row."""
    row = diff_of(what)[file].strip()
    names = vars(module) | {"ROW": None}
    if row.startswith('"'):
        exec(f"ROW = {{{row}}}", names)
        ((name, value),) = names["ROW"].items()
        return name, value
    exec(f"(ROW,) = ({row})", names)
    return names["ROW"]
