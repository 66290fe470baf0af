"""Which device this process uses: the machine's accelerator, unless MINDSPEED_CP_DEVICE is cpu."""

import importlib.util
import sys
from typing import Literal

import torch

from mindspeed_cp.kernels import npu_setup
from mindspeed_cp.settings.notices import warn_this_rank

DEVICE_VARIABLE = "MINDSPEED_CP_DEVICE"
TRANSFER = "torch_npu.contrib.transfer_to_npu"


def why_no_stand_in(choice: str) -> str:
    """Why no CPU stand-in for CUDA is needed; "" if one is needed.

    Args:
        choice: the value of MINDSPEED_CP_DEVICE, "" if it is not set.

    Raises:
        ValueError: the value is not known.
    """
    if choice not in ("", "cpu"):
        raise ValueError(
            f"{DEVICE_VARIABLE}={choice} is not known; use {DEVICE_VARIABLE}=cpu to run on the CPU, or unset it to "
            "choose by what the machine has."
        )
    if choice == "cpu":
        return ""
    accelerator = _accelerator()
    return f"{accelerator} is there ({DEVICE_VARIABLE}=cpu switches the stand-in on)" if accelerator else ""


def device_type(choice: str) -> Literal["cpu", "cuda", "npu"]:
    if not why_no_stand_in(choice):
        return "cpu"
    return "cuda" if _accelerator() == "CUDA" else "npu"


def why_device(choice: str) -> str:
    """The reason for ``device_type``, in words."""
    return why_no_stand_in(choice) or (f"{DEVICE_VARIABLE}={choice}" if choice else "no accelerator can be used")


def prepare_device(choice: str) -> None:
    """Before Megatron is imported, switch the process to NPUs if torch_npu works; warn if it is installed but fails."""
    if choice == "cpu" or _accelerator() == "CUDA":
        return
    if _npu_is_available():
        from mindspeed_cp.patches.machine.npu import prepare_npu

        prepare_npu()
    elif importlib.util.find_spec("torch_npu") is not None:
        warn_this_rank(f"{npu_setup.unavailable()} Set {DEVICE_VARIABLE}=cpu to run on the CPU knowingly.")


def _accelerator() -> Literal["CUDA", "NPU", ""]:
    """ "CUDA", "NPU" or "", independent of torch's build: transfer_to_npu makes torch.cuda refer to the NPU."""
    if TRANSFER not in sys.modules and torch.cuda.is_available():
        return "CUDA"
    return "NPU" if _npu_is_available() else ""


def _npu_is_available() -> bool:
    return importlib.util.find_spec("torch_npu") is not None and not npu_setup.unavailable()


def num_devices(name: Literal["cpu", "cuda", "npu"]) -> int | None:
    """How many devices of a type this process could use; None for CPUs, which take any number of ranks."""
    if name == "cpu":
        return None
    if name == "npu" and not _npu_is_available():
        return 0
    return int(getattr(torch, name).device_count())
