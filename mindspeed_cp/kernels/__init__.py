"""The table of attention kernels. A new accelerator is a file beside this one and a row here.

Adding a kernel:

1. Write a class with the two methods of ``kernels.base.AttentionKernel``.
2. Add a ``KernelRow``: the device type it serves, a loader, and a probe that returns why it cannot be used, or "".
3. Run ``pytest tests --device NAME``: the parity suite is the same for every kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module


@dataclass(frozen=True)
class KernelRow:
    """How to find one kernel.

    Args:
        device_type: torch device type it serves, None for every device.
        module: module that holds ``build() -> AttentionKernel`` and ``unavailable() -> str`` ("" when it can be used).
        automatic: whether it is chosen by device type without --cp-kernel.
    """

    device_type: str | None
    module: str
    automatic: bool = True

    def load(self):
        return import_module(self.module)


KERNELS = {
    "cpu": KernelRow("cpu", "mindspeed_cp.kernels.cpu"),
    "cuda": KernelRow("cuda", "mindspeed_cp.kernels.cuda"),
    "npu": KernelRow("npu", "mindspeed_cp.kernels.npu"),
    "blockwise": KernelRow(None, "mindspeed_cp.kernels.blockwise", automatic=False),
}


@lru_cache(maxsize=None)
def select_kernel(name=None, device_type="cpu"):
    """The kernel called ``name``, or the automatic one of ``device_type``; never a silent substitute.

    Raises:
        ValueError: the name is unknown, serves another device, or cannot be used here; the message gives the reason.
    """
    if name is None:
        names = [key for key, row in KERNELS.items() if row.automatic and row.device_type == device_type]
        if not names:
            raise ValueError(f"no attention kernel serves device {device_type}; choose --cp-kernel blockwise, "
                             f"or add a kernel to mindspeed_cp/kernels ({', '.join(KERNELS)} exist).")
        name = names[0]
    if name not in KERNELS:
        raise ValueError(f"--cp-kernel {name} is not known; choose one of {', '.join(KERNELS)}.")
    row = KERNELS[name]
    if row.device_type not in (None, device_type):
        raise ValueError(f"--cp-kernel {name} serves {row.device_type} tensors, and these are on {device_type}; "
                         "leave --cp-kernel out to choose by device.")
    module = row.load()
    reason = module.unavailable()
    if reason:
        raise ValueError(f"--cp-kernel {name} cannot be used here: {reason}")
    return module.build()
