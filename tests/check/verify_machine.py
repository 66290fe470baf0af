"""What a machine is, for the report of scripts/verify_npu.sh: python tests/check verify_machine npu|cuda|cpu

Prints the versions, the devices and their memory, and the environment; the last line names the kernel that attention
uses, and the exit status is 1 where there is none.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch

Device = Literal["cpu", "cuda", "npu"]
PACKAGES = ("torch", "torch_npu", "megatron-core", "mindspeed", "transformer-engine", "numpy")
# Nothing else of the environment is shown: other variables may be secrets.
PREFIXES = (
    "ASCEND", "CPU_AFFINITY", "CUDA_DEVICE", "CUDA_VISIBLE", "GLOO", "HCCL", "MINDSPEED_CP", "NCCL", "NPU", "OMP",
    "P2P_HCCL", "PYTORCH_NPU", "RANKS", "TASK_QUEUE", "TORCH_DEVICE",
)  # fmt: skip


def device_module(device: Literal["cuda", "npu"]) -> Any:
    """torch.npu or torch.cuda; None where torch finds no such device."""
    if device == "npu" and importlib.util.find_spec("torch_npu"):
        import torch_npu  # noqa: F401
    module = getattr(torch, device, None)
    return module if module is not None and module.is_available() else None


def free_memory(device: Device) -> int:
    """Free bytes of the first device; of the host for the CPU.

    Raises:
        ValueError: torch finds no such device.
    """
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    module = device_module(device)
    if module is None:
        raise ValueError(f"--device {device}: torch finds no such device here; --device cpu needs none.")
    return int(module.mem_get_info(0)[0])


def versions() -> str:
    parts = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def devices(device: Device) -> str:
    if device == "cpu":
        return f"{os.cpu_count()} cores"
    module = device_module(device)
    if module is None:
        return "none"
    return f"{module.device_count()} x {module.get_device_name(0)}, {free_memory(device) / 2**30:.2f} GiB free"


def environment() -> Iterator[str]:
    for name in sorted(os.environ):
        if name.startswith(PREFIXES):
            yield f"{name}={os.environ[name]}"


def tool(*command: str) -> str:
    """What a vendor's tool says, "" where it is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return "\n".join(done.stdout.splitlines()[:40])


def describe(device: Device) -> Iterator[str]:
    yield f"versions: {versions()}"
    yield f"machine: {platform.platform()}, {platform.machine()}, {os.cpu_count()} cores"
    yield f"devices: {devices(device)}"
    home = os.environ.get("ASCEND_HOME_PATH", "")
    if device == "npu":
        yield f"CANN: {home or 'not sourced'}"
        for name in ("ascend_toolkit_install.info", "version.info"):
            path = os.path.join(home, name)
            if home and os.path.isfile(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    yield file.read().strip()
    yield from environment()
    if said := tool(*{"npu": ("npu-smi", "info"), "cuda": ("nvidia-smi",)}.get(device, ("true",))):
        yield said


def main() -> None:
    from mindspeed_cp.kernels import select_kernel

    device: Any = sys.argv[1]
    for line in describe(device):
        print(line)
    try:
        print("kernel", select_kernel(None, device).name)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
