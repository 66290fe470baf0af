"""A program of several modules: its first argument names the one whose ``main`` runs."""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, modules: Mapping[str, str]) -> object:
    """Import the module whose last name is the first argument, and call its ``main``.

    What is imported lies in the repository, in scripts/, in tests/ or in tests/check/, for processes that are started
    too.

    Args:
        program: its folder, as the user writes it. modules: name of a module -> one line of help.
    """
    names = {module.rpartition(".")[2]: module for module in modules}
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        listed = "\n".join(f"  {name:20} {modules[module]}" for name, module in names.items())
        print(f"usage: python {program} NAME [arguments]\n\n{listed}", file=sys.stderr)
        return 2
    path = [str(ROOT / folder) for folder in ("", "scripts", "tests", "tests/check")]
    sys.path[:1] = path  # the first was the program's own folder
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *(one for one in before if one and one not in path)])
    if sys.argv[1] != "kernels":  # which times a device
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    module = names[sys.argv[1]]
    sys.argv = [f"{program} {sys.argv[1]}", *sys.argv[2:]]
    return importlib.import_module(module).main()
