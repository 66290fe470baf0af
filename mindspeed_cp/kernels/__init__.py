"""The table of attention kernels. To support a new accelerator, add a file to this folder and a row to the table.

Adding a kernel, in ten steps:

1. Write ``kernels/mine.py`` with a subclass of ``kernels.base.AttentionKernel``: ``name``, ``native_bands``,
   ``forward`` and ``backward``. ``blockwise.py`` is the shortest complete one.
2. Tensors are (seq, batch, heads, dim); folding batch into heads makes any block one varlen call.
3. Return (out, lse): lse is a natural logarithm; a row without keys has out 0 and lse -inf. Backward gets out and lse
   of the whole attention, and what forward saved.
4. With ``native_bands = False`` no block has two limits; rectangles, causal squares and small masked tiles remain.
5. In the same file: ``build()`` returns the kernel, ``unavailable()`` says what is missing on this machine, or "".
6. Optional: ``merge`` with ``has_fused_merge = True``, a fused ``kernels.merge.merge_attention``, and
   ``memory_order(dtype)``, how tensors should lie in memory ("sequence" or "heads").
7. For inputs that the kernel cannot compute, raise a ValueError, or announce a slower path with ``notices.warn_rank0``;
   never fall back silently.
8. Add a ``KernelRow`` below. The choices of --cp-kernel and the automatic choice by device follow from it.
9. Run ``tests/helpers/kernel_cases.py``'s ``check_block`` over ``CASES``, then
10. ``pytest tests --device NAME``: the parity suite is the same for every kernel.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

from mindspeed_cp.kernels.base import AttentionKernel


@dataclass(frozen=True)
class KernelRow:
    """How to load one kernel.

    Args:
        device_type: torch device type that it serves, None for every device.
        module: module with ``build() -> AttentionKernel`` and ``unavailable() -> str`` ("" if it can be used).
        automatic: whether it is the default for its device type, without --cp-kernel.
    """

    device_type: str | None
    module: str
    automatic: bool = True

    def load(self) -> ModuleType:
        return import_module(self.module)


KERNELS = {
    "cpu": KernelRow("cpu", "mindspeed_cp.kernels.cpu"),
    "cuda": KernelRow("cuda", "mindspeed_cp.kernels.cuda"),
    "cudnn": KernelRow("cuda", "mindspeed_cp.kernels.cudnn", automatic=False),
    "npu": KernelRow("npu", "mindspeed_cp.kernels.npu"),
    "blockwise": KernelRow(None, "mindspeed_cp.kernels.blockwise", automatic=False),
}


@cache
def select_kernel(name: str | None = None, device_type: str = "cpu") -> AttentionKernel:
    """The kernel called ``name``, or the default kernel of ``device_type``; never a silent substitute.

    Raises:
        ValueError: the name is unknown, serves another device, or cannot be used here; the message gives the reason.
    """
    if name is None:
        names = [key for key, row in KERNELS.items() if row.automatic and row.device_type == device_type]
        if not names:
            raise ValueError(
                f"no attention kernel serves device {device_type}; choose --cp-kernel blockwise, "
                f"or add a kernel to mindspeed_cp/kernels ({', '.join(KERNELS)} exist)."
            )
        name = names[0]
    if name not in KERNELS:
        raise ValueError(f"--cp-kernel {name} is not known; choose one of {', '.join(KERNELS)}.")
    row = KERNELS[name]
    if row.device_type not in (None, device_type):
        raise ValueError(
            f"--cp-kernel {name} serves {row.device_type} tensors, and these are on {device_type}; "
            "leave --cp-kernel out to choose by device."
        )
    module = row.load()
    reason: str = module.unavailable()
    if reason:
        raise ValueError(f"--cp-kernel {name} cannot be used here: {reason}")
    built: AttentionKernel = module.build()
    return built
