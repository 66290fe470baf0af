"""Patch of the schedule of dynamic context parallelism (``--hybrid-context-parallel``)."""

import importlib
from collections.abc import Callable
from typing import Any

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.patches.rows import patch, signature_of, uninstalled

SCHEDULES = "megatron.core.pipeline_parallel"


def _schedule_agrees() -> str:
    schedules = importlib.import_module(f"{SCHEDULES}.schedules")
    known = "model_type" in signature_of(schedules.backward_step).parameters
    return "backward_step takes model_type" if known else ""


@patch(
    f"{SCHEDULES}.schedules.backward_step",
    reason="the schedule of --hybrid-context-parallel in 0.17 and 0.18 passes model_type, which backward_step no "
    "longer takes",
    when=(
        uninstalled(f"{SCHEDULES}.hybrid_cp_schedule", "dynamic context parallelism comes with 0.16"),
        _schedule_agrees,
    ),
)
def backward_step(
    adaptor: Adaptor,
    original: Callable[..., Any],
    input_tensor: Any,
    output_tensor: Any,
    output_tensor_grad: Any,
    *more: Any,
    **kwargs: Any,
) -> Any:
    return original(input_tensor, output_tensor, output_tensor_grad, *more[-1:], **kwargs)
