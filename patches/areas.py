"""The areas of patches, in the order in which the adaptor applies them, and how they are printed.

An area is a list of modules with rows as described in ``patches/rows.py``.
"""

import argparse
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.patches import (
    attention,
    batches,
    building,
    delta_net,
    experts,
    latent_attention,
    legacy,
    losses,
    models,
    multi_token_prediction,
    pipeline,
    positions,
    process_groups,
    recompute,
    rotary,
    sparse_attention,
    state_space,
    training,
)
from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.machine import checkout, choice, cpu, libraries, npu, triton
from mindspeed_cp.patches.manager import Patch, PatchRow
from mindspeed_cp.patches.rows import patches_of

PROCESS = (attention, latent_attention, process_groups, batches, models, pipeline, recompute)
MODELS = (building, rotary, positions, experts, multi_token_prediction, state_space, delta_net, sparse_attention)
TRAINING = (losses, training, legacy)
# Purpose of each area, in the order in which areas are printed.
TITLES = {
    "core": "context parallelism in megatron-core",
    "training": "flags and training code of a Megatron-LM checkout",
    "npu": "Megatron on an Ascend NPU",
    "device": "CPU stand-in for the names of torch.cuda that Megatron calls",
    "checkout device": "the same for a Megatron-LM checkout",
    "triton": "Megatron's modules that import Triton whether it is there or not",
    "libraries": "stand-ins for optional libraries that are not installed",
}
# Areas for machines and libraries; the others are context parallelism.
STAND_INS = ("triton", "device", "npu", "libraries", "checkout device")
MORE = "python -m mindspeed_cp.megatron_adaptor --all lists every patch with its reason."


def all_areas(adaptor: Adaptor, device_choice: str) -> dict[str, list[Patch]]:
    """name -> patches. Prepares the device, and imports Megatron after the device's patches are applied.

    Args:
        device_choice: the value of MINDSPEED_CP_DEVICE, "" if it is not set.
    """
    why = choice.why_no_stand_in(device_choice)
    why_no_npu = "" if choice.device_type(device_choice) == "npu" else "no NPU is in use"
    choice.prepare_device(device_choice)
    adaptor.on_change.append(rotary.forget_cached_embeddings)
    return {
        "triton": patches_of([triton]),
        "device": patches_of([cpu], None, lambda: why),
        "npu": npu.npu_patches(lambda: why_no_npu),
        "core": patches_of((*PROCESS, *MODELS), adaptor),
        "libraries": patches_of([libraries]),
        "checkout device": [
            *patches_of([checkout], None, lambda: why, without_checkout),
            *npu.npu_checkout_patches(lambda: why_no_npu),
        ],
        "training": patches_of(TRAINING, adaptor),
    }


def essential_targets(areas: Mapping[str, Iterable[Patch]]) -> frozenset[str]:
    """The names for ``PatchManager.check``: results would be wrong without this project's functions there."""
    return frozenset(
        made.target for name, patches in areas.items() if name not in STAND_INS for made in patches if made.essential
    )


@dataclass(frozen=True)
class Applied:
    """The adaptor's report.

    Args:
        megatron: version of megatron-core.
        device, device_reason: which device is used, and why.
        imported_before: Megatron's modules that were imported before the adaptor.
        patches: area -> its rows, in the order of application.
    """

    megatron: str
    device: str
    device_reason: str
    imported_before: list[str]
    patches: dict[str, list[PatchRow]]


def patch_table(head: str, areas: Mapping[str, Sequence[PatchRow]], *, everything: bool, width: int) -> str:
    """What is patched, as lines of text.

    Args:
        head: versions, for the first line.
        areas: name -> its rows.
        everything: list all rows with target, status and reason; else one line per class and module that "core"
            changes, and one line for every other area.
        width: maximum number of columns in the short form.
    """
    rows = [row for area in areas.values() for row in area]
    lines = [f"{head}, {_count(rows)} patches applied"]
    for name in sorted(areas, key=_place):
        area = areas[name]
        if everything:
            lines += ["", f"{TITLES.get(name, name)}: {_count(area)}"]
            column = max((len(row.target) for row in area), default=0)
            lines += [f"{row.target:{column}}  {row.status}\n    {row.reason}" for row in area]
        else:
            lines.append(_clip(f"{TITLES.get(name, name)}: {_count(area)}{_why_none(area)}", width))
            if name == "core":
                lines += [_clip(line, width) for line in _short(area)]
    return "\n".join(lines if everything else [*lines, MORE])


def _place(name: str) -> int:
    return list(TITLES).index(name) if name in TITLES else len(TITLES)


def _count(rows: Sequence[PatchRow]) -> str:
    return f"{sum(row.applied for row in rows)} of {len(rows)}"


def _why_none(rows: Sequence[PatchRow]) -> str:
    return "" if not rows or any(row.applied for row in rows) else f" ({rows[0].status})"


def _short(rows: Sequence[PatchRow]) -> Iterator[str]:
    """Lines: names that others replaced or wrapped; each class or module with its first patch; unneeded patches."""
    needed = [row for row in rows if row.applied or row.is_lost]
    told = [row for row in needed if row.status != "applied"]
    for row in told:
        yield f"  {_last_two(row):46} {row.status}"
    for first, *others in _alike(row for row in needed if row not in told):
        name = _last_two(first) + (f" and {len(others)} more" if others else "")
        yield f"  {name:46} {first.reason}"
    if len(needed) < len(rows):
        unneeded = ", ".join(_last_two(row) for row in rows if row not in needed)
        yield f"  not needed here: {len(rows) - len(needed)} ({unneeded})"


def _alike(rows: Iterable[PatchRow]) -> list[list[PatchRow]]:
    """Group consecutive rows of the same class or module, or with the same reason."""
    groups: list[list[PatchRow]] = []
    for row in rows:
        last = groups[-1][-1] if groups else None
        if last and (last.reason == row.reason or last.target.rpartition(".")[0] == row.target.rpartition(".")[0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _last_two(row: PatchRow) -> str:
    """Class and method, or module and function: the last two parts of the target."""
    return ".".join(row.target.split(".")[-2:])


def _clip(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 3]}..."


def main(apply: Callable[[], Applied]) -> None:
    """Print ``apply()``, without Megatron's notices about missing libraries."""
    parser = argparse.ArgumentParser(
        prog="python -m mindspeed_cp.megatron_adaptor", description="Show what importing this module patches."
    )
    parser.add_argument("--all", action="store_true", help="every patch, with its reason")
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"(megatron|torch|apex|transformer_engine)\b")
    applied = apply()
    if given.json:
        print(json.dumps(dataclasses.asdict(applied)))
        return
    head, width = f"megatron-core {applied.megatron}, torch {torch.__version__}", shutil.get_terminal_size((110, 40))
    print(patch_table(head, applied.patches, everything=given.all, width=width.columns))
