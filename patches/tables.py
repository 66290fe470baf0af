"""All tables of patches, in the order in which the adaptor applies them."""

from collections.abc import Callable

from mindspeed_cp.patches.core import core_patches
from mindspeed_cp.patches.machine import choice as machine
from mindspeed_cp.patches.machine.checkout import checkout_device_patches, checkout_patches, library_patches
from mindspeed_cp.patches.machine.cpu import device_patches
from mindspeed_cp.patches.machine.npu import npu_checkout_patches, npu_patches
from mindspeed_cp.patches.machine.triton import triton_patches
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.training import training_patches

from mindspeed_cp.megatron.state import AdaptorState
from mindspeed_cp.settings.config import ContextParallelConfig

# What machines and libraries ask for; the others are context parallelism.
STAND_INS = ("triton", "device", "npu", "libraries", "checkout device")


def all_tables(
    state: AdaptorState, announce: Callable[[ContextParallelConfig], None], choice: str
) -> dict[str, list[Patch]]:
    """name -> patches; Megatron is imported on top of the device stand-in, on a device that is prepared here.

    Args:
        announce: called on every rank when the process groups are there.
        choice: the value of MINDSPEED_CP_DEVICE, "" without.
    """
    why = machine.why_no_stand_in(choice)
    why_no_npu = "" if machine.device_type(choice) == "npu" else "no NPU is in use"
    machine.prepare_device(choice)
    return {
        "triton": triton_patches(),
        "device": device_patches(lambda: why),
        "npu": npu_patches(lambda: why_no_npu),
        "core": core_patches(state, announce),
        "libraries": library_patches(),
        "checkout device": [
            *checkout_patches(),
            *checkout_device_patches(lambda: why),
            *npu_checkout_patches(lambda: why_no_npu),
        ],
        "training": training_patches(state),
    }
