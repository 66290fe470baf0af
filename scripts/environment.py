"""Create or complete .venv for scripts/quickstart.sh and scripts/test.sh. It runs with any Python from 3.10 on.

    python3 scripts/environment.py EXTRA     installs this checkout with the extra (train, dev) of setup.py
    python3 scripts/environment.py --oldest  prints the oldest megatron-core that runs on this Python

torch determines the size of the download. If this Python already has a torch of a version that was tried, it is used.
Otherwise torch comes from the index in TORCH_INDEX_URL, or else from pip's default index, after a notice about its
size.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
INDEX_VARIABLE = "TORCH_INDEX_URL"
PAUSE = 10  # seconds before a large download, if run in a terminal


def _table():
    """The module patches/versions.py, which can be loaded before anything is installed."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "patches" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(text):
    print(f"== {text}", flush=True)


def torch_of(python):
    """The version, as known to pip, of the torch that this interpreter imports; None if there is none."""
    code = "import importlib.metadata, torch; print(importlib.metadata.version('torch'))"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    return result.stdout.split()[-1] if result.returncode == 0 and result.stdout else None


def is_tried(version):
    table = _table()
    return table.minor(table.LOWEST_TORCH) <= table.minor(version) <= table.minor(table.TORCH)


def make(folder, with_pip=True):
    """Create the environment, using this Python's torch if possible."""
    table, found = _table(), torch_of(sys.executable)
    taken = found is not None and is_tried(found)
    if taken:
        say(f"Making {folder.name} with torch {found} of {sys.executable}, taken as it is")
    else:
        say(f"Making {folder.name}")
    if found is not None and not taken:
        say(f"torch {found} of {sys.executable} is left alone: {table.LOWEST_TORCH} to {table.TORCH} were tried")
    in_environment = sys.prefix != sys.base_prefix
    venv.create(folder, with_pip=with_pip, symlinks=True, system_site_packages=taken and not in_environment)
    if taken and in_environment:  # "system packages" are not those of a virtual environment that this Python belongs to
        names = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        target = folder / "lib" / version / "site-packages" / "torch_of_another_environment.pth"
        target.write_text("\n".join(dict.fromkeys(names)) + "\n", encoding="utf-8")


def pip(command, *arguments):
    """Run this environment's pip."""
    line = [sys.executable, "-m", "pip", command, "-qq", "--disable-pip-version-check", *arguments]
    if subprocess.run(line, cwd=ROOT).returncode != 0:
        raise SystemExit(f"pip failed: {' '.join(arguments)}")


def pinned(name):
    """The requirement of this package in constraints.txt, for this Python."""
    lines = [line.strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        requirement, _, marker = line.partition(";")
        if requirement.startswith(f"{name}==") and _holds(marker):
            return requirement.strip()
    raise SystemExit(f"constraints.txt pins no {name} for Python {sys.version.split()[0]}")


def _holds(marker):
    """Whether a marker in constraints.txt, a comparison of python_version, holds for this Python."""
    if not marker.strip():
        return True
    name, operator, version = marker.split()
    assert name == "python_version" and operator in ("<", ">="), marker
    minor = _table().minor
    return (sys.version_info[:2] >= minor(version.strip("\"'"))) == (operator == ">=")


def needs_of(requirement):
    """What pip would install for ``requirement``; nothing is downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), requirement)
        (found,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    return found["metadata"].get("requires_dist", [])


def warn_of_size(requirement):
    """If pip's default index has only a CUDA build of torch, print its size and how to avoid it."""
    pip("install", pinned("pip"))  # older versions download a package to find its requirements
    if not any(need.startswith(("nvidia-", "cuda-", "triton")) for need in needs_of(requirement)):
        return
    table, large = _table(), "a build for CUDA: about 3 GB to download, about 6 GB in .venv"
    say(f"{requirement} comes as {large}. To avoid it, set one of")
    print(f"   {INDEX_VARIABLE}=ADDRESS   an index of CPU wheels, such as the one on PyTorch's installation page")
    print(f"   PYTHON=/path/to/python    one that has torch {table.LOWEST_TORCH} to {table.TORCH}, taken as it is")
    if sys.stdout.isatty():
        say(f"Continuing in {PAUSE} seconds")
        time.sleep(PAUSE)


def install(extra):
    """Install everything that the extra needs into this Python's environment; torch as described above."""
    found, index = torch_of(sys.executable), os.environ.get(INDEX_VARIABLE)
    if found is not None and not is_tried(found):
        say(f"torch {found} has not been tried; {_table().LOWEST_TORCH} to {_table().TORCH} were")
    if found is None and index:
        say(f"Installing {pinned('torch')} from the index that {INDEX_VARIABLE} names")
        pip("install", "--no-deps", "-i", index, pinned("torch"))
        found = importlib.metadata.version("torch")
    elif found is None:
        warn_of_size(pinned("torch"))
    say(f"Installing what is missing of mindspeed_cp[{extra}]")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(constraints_with(found), encoding="utf-8")
        pip("install", "--constraint", str(constraints), "--editable", f".[{extra}]")


def constraints_with(torch):
    """constraints.txt with this version of torch; None keeps its own."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    if torch is not None:
        lines = [f"torch=={torch}" if line.startswith("torch==") else line for line in lines]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", nargs="?", choices=["train", "test", "dev"])
    parser.add_argument("--oldest", action="store_true", help="print the oldest megatron-core for this Python")
    options = parser.parse_args(argv)
    table, version = _table(), f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < (3, 10):  # noqa: UP036  it is run by whatever python3 is
        parser.error(f"Python {version} is too old; set PYTHON to one of {', '.join(table.PYTHONS)}")
    if options.oldest:
        print(table.oldest_for(version))
        return
    if options.extra is None:
        parser.error("name an extra, or --oldest")
    folder = ROOT / ".venv"
    if Path(sys.prefix).resolve() != folder.resolve():
        python = str(folder / "bin" / "python")
        if not Path(python).exists():
            make(folder)
        os.execv(python, [python, str(Path(__file__).resolve()), options.extra])  # the constraints are for its version
    if version not in table.PYTHONS:
        say(f"Python {version} has not been tried; {', '.join(table.PYTHONS)} were")
    install(options.extra)


if __name__ == "__main__":
    main()
