"""Runs mypy on the package as installed: patches/ and arguments/ lie inside mindspeed_cp. Arguments go to mypy."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSIDE = ("patches", "arguments")


def main(argv):
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "mindspeed_cp"
        package.mkdir()
        for path in (ROOT / "mindspeed_cp").iterdir():
            (package / path.name).symlink_to(path)
        for name in INSIDE:
            (package / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *argv, "-p", "mindspeed_cp"]
        result = subprocess.run(
            command, cwd=folder, env={**os.environ, "MYPYPATH": folder}, stdout=subprocess.PIPE, text=True
        )
    print(re.sub(rf"^mindspeed_cp/({'|'.join(INSIDE)})/", r"\1/", result.stdout, flags=re.M), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
