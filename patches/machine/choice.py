"""Which device this process uses: the accelerator that the machine has, unless MINDSPEED_CP_DEVICE says cpu."""

import importlib.util
import sys
from typing import Literal

import torch

from mindspeed_cp.kernels import npu_setup
from mindspeed_cp.settings.notices import warn_this_rank

DEVICE_VARIABLE = "MINDSPEED_CP_DEVICE"
TRANSFER = "torch_npu.contrib.transfer_to_npu"


def why_no_stand_in(choice: str) -> str:
    """Why no CPU stand-in for CUDA is needed; "" when it is.

    Args:
        choice: the value of MINDSPEED_CP_DEVICE, "" without.

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
    """Why ``device_type`` is what it is, in words."""
    return why_no_stand_in(choice) or (f"{DEVICE_VARIABLE}={choice}" if choice else "no accelerator can be used")


def prepare_device(choice: str) -> None:
    """Before Megatron is imported: switch the process to NPUs where torch_npu works; where it is installed and does
    not work, say why.
    """
    if choice == "cpu" or _accelerator() == "CUDA":
        return
    if _npu_is_available():
        from mindspeed_cp.patches.machine.npu import prepare_npu

        prepare_npu()
    elif importlib.util.find_spec("torch_npu") is not None:
        warn_this_rank(f"{npu_setup.unavailable()} Set {DEVICE_VARIABLE}=cpu to run on the CPU knowingly.")


def _accelerator() -> Literal["CUDA", "NPU", ""]:
    """ "CUDA", "NPU" or "", whatever torch was built for: transfer_to_npu makes torch.cuda answer for the NPU."""
    if TRANSFER not in sys.modules and torch.cuda.is_available():
        return "CUDA"
    return "NPU" if _npu_is_available() else ""


def _npu_is_available() -> bool:
    return importlib.util.find_spec("torch_npu") is not None and not npu_setup.unavailable()


def num_devices(name: Literal["cpu", "cuda", "npu"]) -> int | None:
    """How many devices of a kind this process could use; None: any number of CPUs' ranks fit."""
    if name == "cpu":
        return None
    if name == "npu" and not _npu_is_available():
        return 0
    return int(getattr(torch, name).device_count())
