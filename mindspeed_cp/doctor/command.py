"""The doctor's command line: runs every check and prints the findings by section, as text or JSON."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from mindspeed_cp.doctor import device, environment, installed
from mindspeed_cp.doctor.finding import Finding, as_json, has_problem

PROVE = "Does your own script compute the same with it? python -m mindspeed_cp.prove SCRIPT ARGS"
DESCRIPTION = "Say whether context parallelism is on here, with which device and kernel, and what to do if not."
Sections = dict[str, list[Finding]]
PACKAGES = ("mindspeed_cp", "torch", "torch_npu", "megatron-core", "transformer_engine", "apex", "numpy", "mindspeed")
VARIABLES = ("ASCEND_HOME_PATH", "CUDA_DEVICE_MAX_CONNECTIONS", "HCCL_", "NCCL_", "GLOO_", "MINDSPEED_CP_", "OMP_NUM")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mindspeed-cp doctor", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    parser.add_argument(
        "--launch", metavar="COMMAND", help="a launch command, or a script with DRY_RUN=1: what it does"
    )
    parser.add_argument("--report", action="store_true", help="versions, devices and problems as a block for an issue")
    parser.add_argument("--no-self-test", action="store_true", help="start no ranks")
    return parser


def examine(given: argparse.Namespace) -> tuple[Sections, dict[str, Any]]:
    """(findings of every check, every patch); checks that need torch are skipped if it does not load."""
    broken = installed.loads_torch()
    npu_works = broken is None and device.npu_works()
    found = [*installed.fitting(), *installed.ascend(os.environ, npu_works), *installed.optional()]
    sections: Sections = {"Installed": found}
    if broken:
        found.append(broken)
        return sections, {}
    record, patches = device.adaptor()
    if record:
        chosen, why = record["device"], record["device_reason"]
    else:
        chosen, why = device.device_without_megatron()
    sections["Device"] = list(device.kernels(chosen, why))
    sections["Patches"] = patches
    own: dict[str, str] = {}
    if given.launch is not None:
        from mindspeed_cp.doctor import launch_findings

        of_launch, own = launch_findings.examined(given.launch, chosen)
    sections["Environment"] = list(environment.findings(os.environ, own, chosen))
    if not given.no_self_test:
        from mindspeed_cp.doctor import self_test

        sections["Self test"] = list(self_test.findings(chosen))
    if given.launch is not None:
        sections["Launch"] = of_launch
    return sections, record["patches"] if record else {}


def text(sections: Sections, width: int) -> str:
    lines = []
    for title, findings in sections.items():
        lines.append(title)
        for finding in findings:
            lines += finding.lines(width)
    return "\n".join([*lines, verdict(_all(sections)), PROVE])


def verdict(findings: Iterable[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    problems, warnings = (f"{number} {level}{'' if number == 1 else 's'}" for level, number in counts.items())
    return f"{problems}, {warnings}. Lines with -> say what to do." if any(counts.values()) else "All is well."


def report(sections: Sections) -> str:
    """What every bug report needs, as one block to paste: versions, devices, and what the doctor found wrong.

    It holds no paths and no values of variables.
    """
    versions = {name: installed.release(name) for name in PACKAGES}
    lines = [
        "```text",
        f"Python {platform.python_version()} ({sys.implementation.name}), {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"devices: {_devices()}",
        f"set: {', '.join(sorted(name for name in os.environ if name.startswith(VARIABLES))) or 'none of ours'}",
    ]
    for title, findings in sections.items():
        bad = [f"{each.level}: {each.text}" for each in findings if each.level in ("problem", "warning")]
        lines += [f"{title}: {line}" for line in bad or [f"{len(findings)} checks are well"]]
    return "\n".join([*lines, "```"])


def _devices() -> str:
    try:
        import torch
    except (ImportError, OSError, RuntimeError):
        return "torch does not load"
    for module in (getattr(torch, "npu", None), torch.cuda):
        if module and module.is_available():
            return f"{module.device_count()} x {module.get_device_name(0)}"
    return "CPU"


def _all(sections: Sections) -> list[Finding]:
    return [finding for findings in sections.values() for finding in findings]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; returns 1 if there is a problem, else 0."""
    given = parser().parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # torch_npu prints while it is imported
        sections, every_patch = examine(given)
    healthy = not has_problem(_all(sections))
    if given.report:
        print(report(sections))
    elif given.json:
        found = {title: as_json(findings) for title, findings in sections.items()}
        print(json.dumps({"healthy": healthy, "sections": found, "patches": every_patch}, indent=2))
    else:
        print(text(sections, min(shutil.get_terminal_size((110, 40)).columns, 120)))
    return 0 if healthy else 1
