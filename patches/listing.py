"""The command line ``python -m mindspeed_cp.megatron_adaptor``: what importing that module patches."""

import argparse
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mindspeed_cp.patches.manager import PatchRow
from mindspeed_cp.patches.table import patch_table


@dataclass(frozen=True)
class Applied:
    """What the adaptor says of itself.

    Args:
        megatron: version of megatron-core.
        device, device_reason: which one is used, and why.
        imported_before: Megatron's modules that were there before the adaptor.
        patches: table -> its rows, in the order of application.
    """

    megatron: str
    device: str
    device_reason: str
    imported_before: list[str]
    patches: dict[str, list[PatchRow]]


def main(apply: Callable[[], Applied]) -> None:
    """Print ``apply()``, without the notices of Megatron about libraries that it does not find."""
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
