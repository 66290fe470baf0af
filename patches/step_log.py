"""Patches of Megatron's training loop that report the cost of context parallelism (--cp-log)."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.rows import arguments_of, patch

TRAINING = "megatron.training.training"


@patch(
    f"{TRAINING}.train_step",
    reason="--cp-log measures the steps of training, not those of validation",
    when=without_checkout,
    essential=False,
)
def train_step(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if adaptor.log is None:
        return original(*args, **kwargs)
    with adaptor.log.step():
        return original(*args, **kwargs)


@patch(
    f"{TRAINING}.training_log",
    reason="--cp-log prints when Megatron does, and uses its TensorBoard writer",
    when=without_checkout,
    essential=False,
)
def training_log(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    if adaptor.log is not None:
        # The place of the iteration differs between versions.
        _report(adaptor, arguments_of(original, args, kwargs)["iteration"])
    return result


def _report(adaptor: Adaptor, iteration: int) -> None:
    """Report at the end of an interval, on all ranks: rank 0 prints; the last rank, with Megatron's writer, writes.

    The first report repeats the startup line, because the original is far above, between Megatron's lines.
    """
    from megatron.training import get_args, get_tensorboard_writer

    if iteration % get_args().log_interval:
        return
    assert adaptor.log is not None
    figures, writer = adaptor.log.interval(), get_tensorboard_writer()
    if dist.get_rank() == 0:
        again = f"\n{adaptor.told}" if iteration == get_args().log_interval else ""
        print(f" iteration {iteration} | {figures.line()}{again}", flush=True)
    if writer:
        for name, value in figures.scalars().items():
            writer.add_scalar(name, value, iteration)
