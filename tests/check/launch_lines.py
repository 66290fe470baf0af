"""Command lines with context parallelism of MindSpeed-LLM's scripts, as the doctor reads them with MindSpeed beside us.

    PYTHONPATH=MEGATRON_LM:MINDSPEED python tests/check launch_lines MINDSPEED_LLM

Every shell script below the folder that mentions context parallelism runs in an empty folder, where torchrun and python
only note their arguments; each line of more than one context-parallel rank is a row of the table. "parses": by the
parser that will run it, MindSpeed-LLM's. "resolves": to an algorithm here, by all rules. Ends with 1 where a line does
neither. No NPU is needed, and nothing is trained.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from mindspeed_cp.doctor import launch_findings
from mindspeed_cp.doctor.launch import Launch
from mindspeed_cp.megatron import flag_checks, unknown_flags

NOTES = '#!/bin/bash\nprintf "%s\\0" "$@" >> "$NOTED"; printf "\\0\\n\\0" >> "$NOTED"\n'
SIZE, SECONDS = "--context-parallel-size", 30


def lines_of(folder):
    """(script of the shell, script of Python, its command line) of every line with more than one rank."""
    for script in sorted(folder.rglob("*.sh")):
        text = script.read_text(encoding="utf-8", errors="replace")
        if SIZE in text:
            for program, *flags in _started_by(text, script):
                sizes = [value for flag, value in zip(flags, flags[1:]) if flag == SIZE]
                if sizes and sizes[-1].isdigit() and int(sizes[-1]) > 1:
                    yield script.relative_to(folder), program, flags


def _started_by(text, script):
    """The Python scripts that a script of the shell would start, each with its command line."""
    with tempfile.TemporaryDirectory() as scratch:
        noted = Path(scratch, "noted")
        noted.touch()
        for name in ("torchrun", "python", "python3"):
            program = Path(scratch, name)
            program.write_text(NOTES)
            program.chmod(0o755)
        variables = {"PATH": f"{scratch}:/usr/bin:/bin", "NOTED": str(noted), "HOME": scratch}
        text = "\n".join(line for line in text.splitlines() if "set_env.sh" not in line)  # CANN's
        try:
            subprocess.run(
                ["bash", "-c", text, str(script)], env=variables, cwd=scratch, capture_output=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"{script} took more than {SECONDS} s", file=sys.stderr)
        for command in noted.read_text(errors="replace").split("\0\n\0"):
            words = command.split("\0")
            start = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
            if start is not None:
                yield words[start:]


class Asked:
    """What the doctor asks in a process for each line, asked in this one: the parser is built once."""

    def __init__(self):
        self.parser_of = functools.cache(unknown_flags.parser_of)

    def __call__(self, module, *arguments, environment=None):
        if module.endswith("flag_checks"):
            return flag_checks.wrong_flags(arguments)
        script, *flags = arguments
        unknown_flags.parser_of = lambda _: self.parser_of(Path(script))
        return unknown_flags.asked(Path(script), flags)


def verdict(folder, program, flags):
    """(why the line does not parse, what it resolves to or why not, the size); "" where it parses."""
    script = folder / Path(program).name
    found = list(launch_findings.findings(Launch(str(script), tuple(flags), runner=True), "cpu"))
    parser = [each.text for each in found if each.level == "problem" and each.text.startswith(script.name)]
    others = [each.text for each in found if each.level == "problem" and not each.text.startswith(script.name)]
    left = [each.text.partition(":")[0] for each in found if "left to MindSpeed" in each.text]
    resolved = [each.text.partition(";")[0] for each in found if " tokens on a rank" in each.text]
    return "; ".join(parser), "; ".join(others or left or resolved), not others and bool(left or resolved)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of MindSpeed-LLM")
    folder = parser.parse_args(arguments).folder.resolve()
    warnings.simplefilter("ignore")
    os.environ["MINDSPEED_CP_DEVICE"] = "cpu"  # no device is needed to parse
    launch_findings.ask = Asked()
    count, kinds = Counter(), Counter()
    print("| script | starts | parses | resolves to |\n|---|---|---|---|")
    for script, program, flags in lines_of(folder):
        refused, resolved, is_whole = verdict(folder, program, flags)
        count.update(all=1, parses=not refused, resolves=is_whole)
        kinds[resolved] += 1
        print(f"| {script} | {Path(program).name} | {refused or 'yes'} | {resolved} |", flush=True)
    if not count["all"]:
        parser.error(f"{folder} holds no script with {SIZE} above 1")
    print(f"\n{count['all']} lines: {count['parses']} parse, {count['resolves']} resolve")
    for kind, number in kinds.most_common():
        print(f"{number:4} {kind}")
    return 0 if count["parses"] == count["resolves"] == count["all"] else 1
