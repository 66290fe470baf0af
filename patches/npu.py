"""How the process is switched to Ascend NPUs."""

from importlib import import_module

from mindspeed_cp.kernels.npu_setup import unavailable


def prepare_npu():
    """Make code that says cuda and nccl run on NPUs and HCCL, through torch_npu's own contrib.transfer_to_npu.

    Call it before Megatron is imported. Needs no apex; Ascend's apex, where installed, is left as it is.

    Raises:
        ValueError: CANN, torch_npu or the device is missing; the message says what to install and source.
    """
    reason = unavailable()
    if reason:
        raise ValueError(f"the NPU cannot be used here: {reason}")
    import_module("torch_npu.contrib.transfer_to_npu")
