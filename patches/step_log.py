"""Patches that let Megatron's training say what context parallelism costs (--cp-log)."""

import inspect
from collections.abc import Callable
from functools import wraps

import torch.distributed as dist
from mindspeed_cp.patches.manager import Patch

TRAINING = "megatron.training.training"


def log_patches(state, when: Callable[[], str]) -> list[Patch]:
    """The table.

    Args:
        state: AdaptorState that the replacements share.
        when: () -> why there is nothing to patch, or "".
    """
    return [
        Patch(f"{TRAINING}.train_step", _train_step(state), "--cp-log measures the steps of training, not those of "
              "validation", when),
        Patch(f"{TRAINING}.training_log", _training_log(state), "--cp-log speaks where Megatron does, and through its "
              "TensorBoard writer", when),
    ]  # fmt: skip


def _train_step(state):
    def build(original):
        @wraps(original)
        def train_step(*args, **kwargs):
            if state.log is None:
                return original(*args, **kwargs)
            with state.log.step():
                return original(*args, **kwargs)

        return train_step

    return build


def _training_log(state):
    def build(original):
        signature = inspect.signature(original)  # the place of the iteration differs between versions

        @wraps(original)
        def training_log(*args, **kwargs):
            result = original(*args, **kwargs)
            if state.log is not None:
                _report(state.log, signature.bind(*args, **kwargs).arguments["iteration"])
            return result

        return training_log

    return build


def _report(log, iteration):
    """At the end of an interval, on all ranks: rank 0 prints, and the rank with Megatron's writer, the last, writes."""
    from megatron.training import get_args, get_tensorboard_writer

    if iteration % get_args().log_interval:
        return
    figures, writer = log.interval(), get_tensorboard_writer()
    if dist.get_rank() == 0:
        print(f" iteration {iteration} | {figures.line()}", flush=True)
    if writer:
        for name, value in figures.scalars().items():
            writer.add_scalar(name, value, iteration)
