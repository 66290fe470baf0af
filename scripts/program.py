"""A program with several subcommands: the first argument names the module whose ``main`` runs."""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, modules: Mapping[str, str]) -> object:
    """Import the module whose last name component is the first argument, and call its ``main``.

    The repository, scripts/, tests/ and tests/check/ are put on the import path, also for processes that are started.

    Args:
        program: the program's folder, as the user types it. modules: name of a module -> one line of help.
    """
    names = {module.rpartition(".")[2]: module for module in modules}
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        listed = "\n".join(f"  {name:20} {modules[module]}" for name, module in names.items())
        print(f"usage: python {program} NAME [arguments]\n\n{listed}", file=sys.stderr)
        return 2
    path = [str(ROOT / folder) for folder in ("", "scripts", "tests", "tests/check")]
    sys.path[:1] = path  # the first entry was the program's own folder
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *(one for one in before if one and one not in path)])
    if sys.argv[1] != "kernels":  # it times a device
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    module = names[sys.argv[1]]
    sys.argv = [f"{program} {sys.argv[1]}", *sys.argv[2:]]
    return importlib.import_module(module).main()
