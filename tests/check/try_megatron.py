"""Try one Megatron with the Python that runs this, and report; scripts/try_megatron.sh makes the environment.

    python tests/check try_megatron FOLDER [--quick] [--steps signatures import tests table]

FOLDER holds megatron/core: a checkout, or a folder of pip install --target. Status 1 when a step failed.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_signatures import differences, read_table, version_of, versions_in

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("signatures", "import", "tests", "table")
SHOWN = 40  # last lines of a step that failed


@dataclass
class Step:
    """What one step did; ``failed`` holds lines that say what broke."""

    name: str
    result: str
    failed: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


def run(name: str, command: list[str], folder: Path) -> Step:
    """Run a command on the Megatron of ``folder``."""
    path = [str(folder), str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in path if part), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = f"{time.monotonic() - start:.0f} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 0:
        return Step(name, f"passed in {seconds}", shown=tuple(_worth(name, done.stdout.strip().splitlines())))
    return Step(name, f"FAILED with status {done.returncode} in {seconds}", tuple(_telling(lines)))


def _worth(name, lines):
    """What a step that passed is worth: the whole table, how many patches were applied, how many tests passed."""
    return lines if name == "table" else lines[:1] if name == "import" else lines[-1:]


def _telling(lines):
    """Lines that name what broke, else the last ones."""
    named = [
        line for line in lines if re.match(r"(FAILED|ERROR) |[\w.]*(Error|Exception): |\S+: \d+ of \d+ passed", line)
    ]
    return dict.fromkeys(named or lines[-SHOWN:])


def compare(folder: Path) -> Step:
    """Signatures of the patched names beside those of the newest tried version."""
    table = read_table()
    lines = differences(folder, table)
    count = sum(not line.startswith(" ") for line in lines)
    result = f"{count} of {len(table['patches'])} patched names differ from {versions_in(table)[-1]}"
    return Step("signatures", result, shown=tuple(lines))


def steps(folder: Path, chosen, quick: bool):
    """Yield a Step for each of the chosen ones."""
    if "signatures" in chosen:
        yield compare(folder)
    if "import" in chosen:
        yield run("import", [sys.executable, "-m", "mindspeed_cp.megatron_adaptor"], folder)
    if "tests" in chosen:
        yield run("tests", [sys.executable, "-m", "pytest", "-q", "-m", "megatron", "-p", "no:cacheprovider"], folder)
    if "table" in chosen and not (folder / "pretrain_gpt.py").is_file():
        yield Step("table", "not run: a wheel has no pretrain_gpt.py; name a Megatron-LM checkout")
    elif "table" in chosen:
        command = [sys.executable, str(ROOT / "tests" / "check"), "megatron_lm", str(folder)]
        yield run("table", [*command, *(["--quick"] if quick else [])], folder)


def report(version: str, done: list[Step]) -> str:
    """Markdown: a line per step, then what they show."""
    lines = [f"# Megatron {version}", "", "| step | result |", "|---|---|"]
    lines += [f"| {step.name} | {step.result} |" for step in done]
    for step in done:
        if step.failed or step.shown:
            lines += ["", f"## {step.name}", "", *step.failed, *step.shown]
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that holds megatron/core")
    parser.add_argument("--quick", action="store_true", help="the short subset of the table")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these")
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    if not (folder / "megatron" / "core" / "package_info.py").is_file():
        parser.error(f"{folder} holds no megatron/core; name a checkout or a folder of pip install --target.")
    done = list(steps(folder, options.steps, options.quick))
    print(report(version_of(folder), done))
    return 1 if any(step.result.startswith("FAILED") for step in done) else 0


if __name__ == "__main__":
    sys.exit(main())
