"""Run mypy on the package. Arguments are passed to mypy."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.exit(subprocess.call([sys.executable, "-m", "mypy", *sys.argv[1:], "-p", "mindspeed_cp"], cwd=ROOT))
