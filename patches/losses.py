"""Patch of Megatron's schedule: combine the ranks' losses of a micro-batch if their token counts differ."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.losses import counts_are_added
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.megatron.targets import with_an_entry_in_front
from mindspeed_cp.patches.rows import patch


@patch(
    "megatron.core.pipeline_parallel.schedules.forward_step",
    reason="from 0.13 each rank divides its loss by its own token count, which is the mean only for equal counts; "
    "uneven lengths and masked tokens make them differ, and an evaluation with --sft divides what each rank reports",
)
def forward_step(
    adaptor: Adaptor,
    original: Callable[..., Any],
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    scope = adaptor.scope_of(unwrapped(model))
    if not scope.alone:
        forward_step_func = _with_losses_of_the_sequence(adaptor, scope, forward_step_func)
    return original(forward_step_func, data_iterator, model, *args, **kwargs)


def unwrapped(model: Any) -> Any:
    """The model inside its wrappers for data parallelism and precision."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _with_losses_of_the_sequence(
    adaptor: Adaptor, scope: Scope, forward_step_func: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(forward_step_func)
    def run(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        output, loss_func = forward_step_func(data_iterator, model, *args, **kwargs)
        if loss_func is None:
            return output, None
        if adaptor.settings.moving_targets is not None:
            loss_func = with_an_entry_in_front(loss_func)
        per_token = unwrapped(model).config.calculate_per_token_loss
        return output, _of_the_sequence(adaptor, scope, loss_func, per_token)

    return run


def _of_the_sequence(
    adaptor: Adaptor, scope: Scope, loss_func: Callable[..., Any], per_token: bool
) -> Callable[..., Any]:
    """Wrap ``loss_func`` so that, after Megatron's scaling, its result is the mean over all tokens of the sequence."""

    @wraps(loss_func)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = loss_func(*args, **kwargs)
        if kwargs.get("non_loss_data") or not isinstance(result, tuple) or len(result) not in (2, 3):
            return result
        if not torch.is_grad_enabled():
            return (*result[:-1], _of_all_ranks(scope, result[-1]))
        adaptor.losses.watch(scope, result, counts_are_added())
        # With a per-token loss, gradients are summed and divided by the global count at the end of the step.
        return result if len(result) == 2 or per_token else _weighted(scope, *result)

    return call


def _weighted(scope: Scope, loss: torch.Tensor, num_tokens: torch.Tensor, report: Any) -> tuple[Any, ...]:
    """Scale the loss so that Megatron's division by the rank's own count divides it by the mean count of the ranks.

    Since gradients are averaged over the context-parallel ranks, this gives the mean over all tokens. If every rank
    returns the count of the whole sequence, as in Megatron 0.12, the factor is 1.
    """
    total = num_tokens.clone()
    dist.all_reduce(total, group=scope.group)
    factor = num_tokens.clamp(min=1) * scope.size / total.clamp(min=1)
    return loss * factor.to(loss.dtype), num_tokens, report


def _of_all_ranks(scope: Scope, report: Any) -> Any:
    """A report whose pairs (sum of losses, number of tokens) are the means over the ranks.

    Megatron sums them over the ranks or, with --sft, averages the ranks' quotients; both give the loss.
    """
    if not isinstance(report, dict):
        return report
    shared = dict(report)
    for name, value in report.items():
        if isinstance(value, torch.Tensor) and value.numel() == 2:
            shared[name] = mean = value.detach().float().clone()
            dist.all_reduce(mean, group=scope.group)
            mean /= scope.size
    return shared
