"""Patch of how Megatron averages the loss of a micro-batch whose tokens are unevenly shared."""

from functools import wraps

import torch.distributed as dist
from mindspeed_cp.patches.manager import Patch


def loss_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            "megatron.core.pipeline_parallel.schedules.forward_step",
            _forward_step(state),
            "from 0.13 each rank divides its loss by its own token count, which is the mean only for equal counts; "
            "uneven "
            "lengths and masked tokens make them differ",
        )
    ]


def _forward_step(state):
    def build(original):
        @wraps(original)
        def forward_step(forward_step_func, data_iterator, model, *args, **kwargs):
            if state.cp_size == 1:
                return original(forward_step_func, data_iterator, model, *args, **kwargs)
            return original(_with_shared_count(state, forward_step_func), data_iterator, model, *args, **kwargs)

        return forward_step

    return build


def _with_shared_count(state, forward_step_func):
    @wraps(forward_step_func)
    def run(data_iterator, model, *args, **kwargs):
        output, loss_func = forward_step_func(data_iterator, model, *args, **kwargs)
        return output, loss_func if loss_func is None or _is_per_token(model) else _weighted(state, loss_func)

    return run


def _is_per_token(model):
    """Whether gradients are divided by the global token count at the end of the step, where all counts are added up."""
    from megatron.core.utils import get_model_config

    return get_model_config(model).calculate_per_token_loss


def _weighted(state, loss_func):
    """``loss_func`` whose loss, divided by the rank's own count, is the loss divided by the mean count of the ranks.

    Gradients are averaged over the context-parallel ranks, so that is the mean over all tokens. Where every rank
    returns the count of the whole sequence, as Megatron 0.12 does, the factor is 1.
    """

    @wraps(loss_func)
    def call(*args, **kwargs):
        result = loss_func(*args, **kwargs)
        if not isinstance(result, tuple) or len(result) != 3:
            return result
        loss, num_tokens, report = result
        total = num_tokens.clone()
        dist.all_reduce(total, group=state.groups.cp_group)
        factor = num_tokens.clamp(min=1) * state.cp_size / total.clamp(min=1)
        return loss * factor.to(loss.dtype), num_tokens, report

    return call
