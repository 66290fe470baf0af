"""All tables of patches, in the order in which the adaptor applies them."""

from mindspeed_cp.patches import (
    attention,
    batches,
    building,
    dynamic,
    experts,
    legacy,
    losses,
    models,
    multi_token_prediction,
    pipeline,
    positions,
    process_groups,
    recompute,
    rotary,
    state_space,
    step_log,
    training,
)
from mindspeed_cp.patches.machine import choice as machine
from mindspeed_cp.patches.machine.checkout import checkout_device_patches, checkout_patches, library_patches
from mindspeed_cp.patches.machine.cpu import device_patches
from mindspeed_cp.patches.machine.npu import npu_checkout_patches, npu_patches
from mindspeed_cp.patches.machine.triton import triton_patches
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.rows import rows_of

from mindspeed_cp.megatron.adaptor import Adaptor

# What machines and libraries ask for; the others are context parallelism.
STAND_INS = ("triton", "device", "npu", "libraries", "checkout device")
PROCESS = (attention, process_groups, batches, models, pipeline, dynamic, recompute)
MODELS = (building, rotary, positions, experts, multi_token_prediction, state_space)
TRAINING = (losses, step_log, training, legacy)


def all_tables(adaptor: Adaptor, choice: str) -> dict[str, list[Patch]]:
    """name -> patches; Megatron is imported on top of the device stand-in, on a device that is prepared here.

    Args:
        choice: the value of MINDSPEED_CP_DEVICE, "" without.
    """
    why = machine.why_no_stand_in(choice)
    why_no_npu = "" if machine.device_type(choice) == "npu" else "no NPU is in use"
    machine.prepare_device(choice)
    adaptor.on_change.append(rotary.forget_cached_embeddings)
    return {
        "triton": triton_patches(),
        "device": device_patches(lambda: why),
        "npu": npu_patches(lambda: why_no_npu),
        "core": [*_of(PROCESS, adaptor), *_of(MODELS, adaptor)],
        "libraries": library_patches(),
        "checkout device": [
            *checkout_patches(),
            *checkout_device_patches(lambda: why),
            *npu_checkout_patches(lambda: why_no_npu),
        ],
        "training": _of(TRAINING, adaptor),
    }


def _of(modules, adaptor: Adaptor) -> list[Patch]:
    return [patch for module in modules for row in rows_of(module) for patch in row.patches(adaptor)]
