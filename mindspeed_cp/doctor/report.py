"""The information that every bug report needs, as one block to paste: no paths, no values of variables."""

import os
import platform
import sys
from collections.abc import Iterable

from mindspeed_cp.doctor.finding import Finding
from mindspeed_cp.doctor.installed import release

PACKAGES = ("mindspeed_cp", "torch", "torch_npu", "megatron-core", "transformer_engine", "apex", "numpy", "mindspeed")
VARIABLES = ("ASCEND_HOME_PATH", "CUDA_DEVICE_MAX_CONNECTIONS", "HCCL_", "NCCL_", "GLOO_", "MINDSPEED_CP_", "OMP_NUM")


def text(sections: dict[str, list[Finding]]) -> str:
    """Markdown: versions, devices, which variables are set, and what the doctor found wrong.

    Args:
        sections: title -> the doctor's findings.
    """
    versions = {name: release(name) for name in PACKAGES}
    lines = [
        "```text",
        f"Python {platform.python_version()} ({sys.implementation.name}), {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"devices: {_devices()}",
        f"set: {', '.join(sorted(name for name in os.environ if name.startswith(VARIABLES))) or 'none of ours'}",
    ]
    for title, findings in sections.items():
        lines += [f"{title}: {line}" for line in _told(findings)]
    return "\n".join([*lines, "```"])


def _told(findings: Iterable[Finding]) -> list[str]:
    """The warnings and problems, or the number of checks if all passed."""
    found = list(findings)
    bad = [f"{finding.level}: {finding.text}" for finding in found if finding.level in ("problem", "warning")]
    return bad or [f"{len(found)} checks are well"]


def _devices() -> str:
    try:
        import torch
    except (ImportError, OSError, RuntimeError):
        return "torch does not load"
    for device in ("npu", "cuda"):
        if hasattr(torch, device) and getattr(torch, device).is_available():
            module = getattr(torch, device)
            return f"{module.device_count()} x {module.get_device_name(0)}"
    return "CPU"
