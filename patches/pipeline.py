"""Patches of Megatron's schedules: the shapes that stages exchange, and dynamic context parallelism."""

import importlib
from collections.abc import Callable
from typing import Any

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.scopes import Scope, named_group
from mindspeed_cp.patches.rows import arguments_of, patch, signature_of, uninstalled

SCHEDULES = "megatron.core.pipeline_parallel.schedules"


def _split(adaptor: Adaptor, config: Any, given: dict[str, Any]) -> Scope | None:
    """The scope of a stage; None if nothing is split or if stages communicate their shapes."""
    scope = adaptor.scope_of_group(named_group(given))
    untouched = scope.alone or config.context_parallel_size == 1 or config.variable_seq_lengths
    return None if untouched else scope


@patch(
    f"{SCHEDULES}.get_tensor_shapes",
    reason="pipeline stages exchange seq_length / cp rows, which differs between ranks for uneven lengths",
)
def get_tensor_shapes(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    shapes, given = original(*args, **kwargs), arguments_of(original, args, kwargs)
    config = given["config"]
    scope = _split(adaptor, config, given)
    if scope is None:
        return shapes
    seq_len = given.get("decoder_seq_length") or given["seq_length"]
    rows = adaptor.layout(seq_len, scope=scope).length(scope.rank)
    rows = rows // config.tensor_model_parallel_size if config.sequence_parallel else rows
    return [(rows, *shape[1:]) if shape else shape for shape in shapes]


@patch(
    f"{SCHEDULES}.forward_backward_pipelining_with_interleaving",
    reason="pipeline stages exchange seq_length / cp rows, also if they are interleaved",
)
def interleaved(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.core.utils import get_model_config

    given = signature_of(original).bind(*args, **kwargs)
    scope = _split(adaptor, get_model_config(given.arguments["model"][0]), given.arguments)
    if scope is None:
        return original(*args, **kwargs)
    # The schedule only divides the length by cp.
    rows = adaptor.layout(given.arguments["seq_length"], scope=scope).length(scope.rank)
    given.arguments["seq_length"] = rows * scope.size
    return original(*given.args, **given.kwargs)


def _schedule_agrees() -> str:
    schedules = importlib.import_module(SCHEDULES)
    known = "model_type" in signature_of(schedules.backward_step).parameters
    return "backward_step takes model_type" if known else ""


@patch(
    f"{SCHEDULES}.backward_step",
    reason="the schedule of --hybrid-context-parallel in 0.17 and 0.18 passes model_type, which backward_step no "
    "longer takes",
    when=(
        uninstalled(
            "megatron.core.pipeline_parallel.hybrid_cp_schedule", "dynamic context parallelism comes with 0.16"
        ),
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
