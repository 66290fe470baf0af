"""What is installed and whether it loads: torch, torch_npu with CANN and the driver, optional libraries."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_cp.doctor.finding import Finding

TIMEOUT = 300  # seconds for a first import from a slow disk
ASCEND = Path("/usr/local/Ascend")
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
ON_CPU = "export TORCH_DEVICE_BACKEND_AUTOLOAD=0 MINDSPEED_CP_DEVICE=cpu"
# package -> what its absence means
OPTIONAL = {
    "transformer-engine": "use --transformer-impl local",
    "apex": "use --no-gradient-accumulation-fusion --no-persist-layer-norm",
}


def release(package: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run ``python -m module arguments`` and parse the JSON that it prints; Megatron is imported in that process only.

    Args:
        environment: variables in addition to those of this process.

    Raises:
        RuntimeError: it failed (the message is the last line that it printed), or it took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"python -m {module} took more than {TIMEOUT} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"it ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def fitting() -> Iterator[Finding]:
    """Whether Python, torch, Megatron and its compiled helpers are supported, by the table of versions."""
    try:
        yield from (Finding(*row) for row in ask("mindspeed_cp.patches.fit"))
    except RuntimeError as error:
        yield Finding(
            "problem", f"the installation cannot be read: {error}", "pip install --force-reinstall mindspeed_cp"
        )


def ascend(environment: Mapping[str, str], npu_works: bool) -> Iterator[Finding]:
    """Findings about torch_npu, CANN and the driver; no findings if none of them is installed."""
    torch_npu, torch, cann = release("torch_npu"), release("torch"), cann_version(environment)
    driver = _field(ASCEND / "driver" / "version.info", "Version")
    if driver:
        yield Finding("ok", f"Ascend driver {driver}")
    if torch_npu is None:
        if driver or cann:
            yield Finding(
                "problem",
                "Ascend's software is installed and torch_npu is not",
                f"pip install torch_npu=={(torch or '2.9.0').partition('+')[0]} (docs/npu.md has the table)",
            )
        return
    if cann:
        yield Finding("ok", f"CANN {cann}")
    elif npu_works:
        yield Finding("note", "CANN loads, and its version is not known: set_env.sh was not sourced")
    elif environment.get("MINDSPEED_CP_DEVICE") != "cpu":
        yield Finding("problem", f"torch_npu {torch_npu} is installed and no CANN is set up", f"{SET_ENV}, or {ON_CPU}")
    if torch and _minor(torch) != _minor(torch_npu) and int(torch_npu.partition(".")[0]) < 20:
        yield Finding(
            "problem",
            f"torch_npu {torch_npu} does not match torch {torch}",
            f"pip install torch=={torch_npu.partition('.post')[0]}",
        )
    else:
        yield Finding("ok", f"torch_npu {torch_npu}")


def cann_version(environment: Mapping[str, str]) -> str | None:
    """CANN's version from its version file; "unknown" if set_env.sh was sourced but no file has the version."""
    home = environment.get("ASCEND_TOOLKIT_HOME") or environment.get("ASCEND_HOME_PATH")
    if not home or not Path(home).is_dir():
        return None
    files = sorted(Path(home).glob("**/ascend_toolkit_install.info"))[:1]
    return next(filter(None, (_field(path, "version") for path in files)), "unknown")


def _field(path: Path, name: str) -> str | None:
    try:
        found = re.search(rf"^{name}=(\S+)", path.read_text(encoding="utf-8", errors="replace"), re.M | re.I)
    except OSError:
        return None
    return found[1] if found else None


def _minor(version: str) -> list[str]:
    return version.partition("+")[0].split(".")[:2]


def optional() -> Iterator[Finding]:
    for package, meaning in OPTIONAL.items():
        version = release(package)
        yield Finding("ok", f"{package} {version}") if version else Finding("note", f"no {package}: {meaning}")


def loads_torch() -> Finding | None:
    """Import torch here; returns a problem if that fails, as it does with torch_npu but without CANN."""
    # Read first, because torch_npu sets the variable while it loads.
    npu = release("torch_npu") and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"
    try:
        importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        way_out = f"{SET_ENV}, or {ON_CPU}" if npu else "pip install --force-reinstall torch"
        return Finding("problem", f"torch does not load: {said}", way_out)
    return None
