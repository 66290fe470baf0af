"""mindspeed_cp.torchrun: a refused command line is one line and status 2, everything else is torchrun's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only


def run(script, text, *flags):
    script.write_text(text)
    command = [
        sys.executable,
        "-m",
        "mindspeed_cp.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        *flags,
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_a_refused_command_line_is_one_line_and_status_2(tmp_path):
    script = "import os, sys, time\nif os.environ['RANK'] == '0':\n    print('t.py: error: no', file=sys.stderr)\n"
    script += "    sys.exit(2)\n"
    done = run(tmp_path / "t.py", script + "time.sleep(60)\n")
    assert (done.returncode, done.stderr, done.stdout) == (2, "t.py: error: no\n", "")


def test_a_script_that_fails_is_reported_as_torchrun_does_and_one_that_ends_is_well(tmp_path):
    done = run(tmp_path / "t.py", "import sys\nsys.exit(3)\n")
    assert done.returncode == 1 and "ChildFailedError" in done.stderr and "exitcode: 3" in done.stderr
    done = run(tmp_path / "t.py", "import os\nprint(os.environ['WORLD_SIZE'])\n")
    assert (done.returncode, done.stdout) == (0, "2\n2\n")
