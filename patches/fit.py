"""Whether Python, torch and Megatron fit together, by the table of versions; ``python -m mindspeed_cp.patches.fit``.

Prints a JSON list of (level, text, todo), like the doctor's findings; imports neither torch nor Megatron.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import platform
import runpy
import shutil
from pathlib import Path

from mindspeed_cp.patches.versions import DEFAULT, LOWEST_TORCH, MEGATRONS, PYTHONS, TORCH, minor

Finding = tuple[str, str, str]
HELPERS = "helpers_cpp"  # megatron.core.datasets compiles it


def findings() -> list[Finding]:
    """All findings that need no import of the checked packages."""
    python, torch, core = platform.python_version(), _release("torch"), core_folder()
    found = [*python_findings(python), *torch_findings(torch)]
    if core is None:
        return [*found, missing(python)]
    version = runpy.run_path(str(core / "package_info.py")).get("__version__", "unknown").split("rc")[0]
    checkout = (core.parent / "training").is_dir() and not _is_installed(core)
    found.append(megatron_finding(version, python, f"the checkout {core.parents[1]}" if checkout else "installed"))
    return [*found, *helper_findings(core / "datasets")]


def core_folder() -> Path | None:
    """The folder of the megatron.core that would be imported."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _release(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_installed(core: Path) -> bool:
    return core.parents[1].name in ("site-packages", "dist-packages")


def python_findings(python: str) -> list[Finding]:
    lowest, highest = minor(PYTHONS[0]), minor(PYTHONS[-1])
    if lowest <= minor(python) <= highest:
        return [("ok", f"Python {python}", "")]
    way_out = f"use Python {PYTHONS[0]} to {PYTHONS[-1]}"
    return [("problem" if minor(python) < lowest else "warning", f"Python {python} was not tried", way_out)]


def torch_findings(torch: str | None) -> list[Finding]:
    if torch is None:
        return [("problem", "torch is not installed", f"pip install torch=={TORCH}")]
    if minor(torch) < minor(LOWEST_TORCH):
        return [("problem", f"torch {torch} is too old", f"pip install torch=={TORCH}; {LOWEST_TORCH} is the lowest")]
    if minor(torch) > minor(TORCH):
        way_out = f"pip install torch=={TORCH}, or run bash scripts/test.sh with it"
        return [("warning", f"torch {torch} is newer than the tried ones", way_out)]
    return [("ok", f"torch {torch}", "")]


def missing(python: str) -> Finding:
    version = newest_for(python)
    way_out = f"pip install megatron-core=={version}, or export PYTHONPATH=PATH_OF_MEGATRON_LM"
    return "problem", "Megatron is missing: there is no megatron.core", way_out


def newest_for(python: str) -> str:
    """The default version, or the newest one with wheels for this Python if the default has none."""
    fitting = [
        row.version for row in MEGATRONS if minor(row.pythons[0]) <= minor(python)[:2] <= minor(row.pythons[1])
    ] or [DEFAULT]
    return DEFAULT if DEFAULT in fitting else fitting[-1]


def megatron_finding(version: str, python: str, where: str) -> Finding:
    name = f"megatron-core {version}, {where}"
    row = next((row for row in MEGATRONS if row.version == version), None)
    if row is not None:
        lowest, highest = row.pythons
        if minor(lowest) <= minor(python) <= minor(highest):
            return "ok", name, ""
        way_out = f"use Python {lowest} to {highest}, or pip install megatron-core=={newest_for(python)}"
        text = f"{name}: it is for Python {lowest} to {highest}, and this is {python}"
        return "problem" if minor(python) < minor(lowest) else "warning", text, way_out
    numbers = [int(part) for part in version.split("+")[0].split(".") if part.isdigit()]
    known = [[int(part) for part in row.version.split(".")] for row in MEGATRONS]
    kind = "too new" if numbers > known[-1] else "too old" if numbers < known[0] else "between the tried versions"
    tried = ", ".join(row.version for row in MEGATRONS)
    way_out = (
        f"pip install megatron-core=={newest_for(python)} (tried: {tried}), or bash scripts/try_megatron.sh {version}"
    )
    return "problem" if kind == "too old" else "warning", f"{name}: {kind}", way_out


def helper_findings(folder: Path) -> list[Finding]:
    """Findings about Megatron's compiled helpers: for another Python, older than their source, or not loadable."""
    libraries = sorted(folder.glob(f"{HELPERS}*.so"))
    usable = [path for path in libraries if path.name.removeprefix(HELPERS) in importlib.machinery.EXTENSION_SUFFIXES]
    found = [
        ("problem", f"{path} {why}", f"rm {path}; Megatron compiles it again at the next start")
        for path in usable
        if (why := "is older than helpers.cpp" if _is_older(path, folder / "helpers.cpp") else _why_not(path))
    ]
    if libraries and not usable:
        found = [_of_another_python(libraries[0])]
    return found


def _of_another_python(library: Path) -> Finding:
    missing = [tool for tool in ("make", "g++") if shutil.which(tool) is None]
    if missing:
        way_out = f"install {' and '.join(missing)}: Megatron compiles its helpers for this Python at the next start"
        return "problem", f"{library} is of another Python", way_out
    return "note", f"{library} is of another Python; Megatron compiles one for this at the next start", ""


def _is_older(library: Path, source: Path) -> bool:
    # Files of an installed wheel have the times of its unpacking, which are meaningless here.
    installed = "site-packages" in library.parts
    return not installed and source.exists() and library.stat().st_mtime < source.stat().st_mtime


def _why_not(library: Path) -> str:
    """Why a library does not load, "" if it does."""
    spec = importlib.util.spec_from_file_location(HELPERS, library)
    assert spec is not None
    try:
        importlib.util.module_from_spec(spec)
    except ImportError as error:
        return f"does not load ({error})"
    return ""


if __name__ == "__main__":
    print(json.dumps(findings()))
