"""What ``python -m mindspeed_cp.megatron_adaptor`` prints: one screen, or every patch with its reason."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from mindspeed_cp.patches.manager import PatchRow

# What a group of patches is for; the order of the groups on the screen.
TITLES = {
    "core": "context parallelism in megatron-core",
    "training": "flags and training code of a Megatron-LM checkout",
    "npu": "Megatron on an Ascend NPU",
    "device": "CPU stand-in for the names of torch.cuda that Megatron calls",
    "checkout device": "the same for a Megatron-LM checkout",
    "libraries": "stand-ins for optional libraries that are not installed",
}
MORE = "python -m mindspeed_cp.megatron_adaptor --all lists every patch with its reason."


def patch_table(head: str, groups: Mapping[str, Sequence[PatchRow]], *, everything: bool, width: int) -> str:
    """What is patched, as lines of text.

    Args:
        head: versions, for the first line.
        groups: name of a group -> its rows; TITLES says what known groups are for.
        everything: list all rows with target, status and reason; else the rows of "core" in one line each, or one for
            several of one reason, and one line for every other group.
        width: columns that a line of the short form may have.
    """
    rows = [row for group in groups.values() for row in group]
    lines = [f"{head}, {_count(rows)} patches applied"]
    for name in sorted(groups, key=_place):
        group = groups[name]
        if everything:
            lines += ["", f"{TITLES.get(name, name)}: {_count(group)}"]
            column = max((len(row.target) for row in group), default=0)
            lines += [f"{row.target:{column}}  {row.status}\n    {row.reason}" for row in group]
        else:
            lines.append(_clip(f"{TITLES.get(name, name)}: {_count(group)}{_why_none(group)}", width))
            if name == "core":
                lines += [_clip(_short(list(alike)), width) for _, alike in groupby(group, _said)]
    return "\n".join(lines if everything else [*lines, MORE])


def _place(name: str) -> int:
    return list(TITLES).index(name) if name in TITLES else len(TITLES)


def _count(rows: Sequence[PatchRow]) -> str:
    return f"{sum(row.applied for row in rows)} of {len(rows)}"


def _why_none(rows: Sequence[PatchRow]) -> str:
    return "" if not rows or any(row.applied for row in rows) else f" ({rows[0].status})"


def _said(row: PatchRow) -> str:
    return row.reason if row.applied else f"not applied: {row.status}"


def _short(rows: list[PatchRow]) -> str:
    """Class and method, or module and function: the last two parts of the target; and what is said of it."""
    name = ".".join(rows[0].target.split(".")[-2:])
    if len(rows) > 1:
        name += f" and {len(rows) - 1} more"
    return f"  {name:46} {_said(rows[0])}"


def _clip(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 3]}..."
