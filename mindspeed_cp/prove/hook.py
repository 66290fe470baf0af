"""prove for frameworks without a training script: every rank of a world calls ``prove``, which trains a few steps
without context parallelism and again with it, on the same batches and from the same seed.

    torchrun --nproc-per-node 2 my_proof.py       # my_proof.py calls mindspeed_cp.prove.prove(...)
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.prove import watching
from mindspeed_cp.prove.comparing import compare
from mindspeed_cp.prove.limits import limits_of
from mindspeed_cp.prove.recording import Record, Recorder
from mindspeed_cp.prove.report import Verdict
from mindspeed_cp.settings.config import ContextParallelConfig

RATE = 0.1  # learning rate of plain gradient descent between two steps


def prove(
    model_provider: Callable[[], Any],
    batches: Sequence[Any],
    forward_step: Callable[..., Any],
    *,
    config: ContextParallelConfig | None = None,
    steps: int = 1,
    dtype: str = "float32",
    seed: int = 1234,
    title: str = "prove",
) -> Verdict:
    """Compare training with and without context parallelism; every rank of the world calls this.

    Args:
        model_provider: () -> a megatron-core model or the list of its chunks; called once per run, after the process
            groups exist. Models that are not wrapped for data parallelism are wrapped.
        batches: the whole micro-batches of a step, as the framework's iterator yields them.
        forward_step: Megatron's (iterator, model) -> (output, loss function); it splits the batch, as in training.
        config: context parallelism over the whole world; None for Ulysses.
        steps: number of steps, on the same batches, with plain gradient descent between them.
        dtype: "float32" or "bfloat16", which determines the limits.

    Returns:
        the same verdict on every rank; ``print(report.text(verdict))`` shows it.

    Raises:
        ValueError: ``config`` does not fit the world.
    """
    config = config or ContextParallelConfig(context_parallel_size=dist.get_world_size())
    if config.context_parallel_size != dist.get_world_size() or config.context_parallel_size < 2:
        raise ValueError(
            f"context_parallel_size {config.context_parallel_size} must be the number of ranks, "
            f"{dist.get_world_size()}, and at least 2; start as many."
        )
    records = [
        gathered(record_run(model_provider, batches, forward_step, config=each, steps=steps, seed=seed))
        for each in (ContextParallelConfig(context_parallel_size=1), config)
    ]
    return judge(*records, dtype=dtype, title=title)


def judge(expected: Sequence[Record], found: Sequence[Record], *, dtype: str = "float32", title: str = "") -> Verdict:
    """The verdict on the records of all ranks of two runs."""
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    comparison = compare(expected, found, limits_of(dtype, device))
    return Verdict(title, comparison.cp, comparison)


def gathered(record: Record) -> list[Record]:
    """The records of all ranks, on every rank."""
    records: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(records, record)
    return records


def record_run(
    model_provider: Callable[[], Any],
    batches: Sequence[Any],
    forward_step: Callable[..., Any],
    *,
    config: ContextParallelConfig,
    steps: int = 1,
    seed: int = 1234,
    groups: Callable[[ContextParallelConfig], contextlib.AbstractContextManager[Any]] | None = None,
) -> Record:
    """Train with one configuration and record what this rank computes.

    Args:
        groups: makes Megatron's process groups for the duration of a run; None for ``model_parallel``.
    """
    with (groups or model_parallel)(config):
        _seed(seed)
        chunks = [_wrapped(chunk) for chunk in watching.listed(model_provider())]
        recorder = Recorder(*watching.layout(ours=True))
        with watching.watch(recorder):
            for _ in range(steps):
                _step(chunks, batches, forward_step)
                recorder.grad_norm(_descend(chunks))
    return recorder.record


@contextlib.contextmanager
def model_parallel(config: ContextParallelConfig) -> Iterator[None]:
    """Context manager: Megatron's process groups for ``config``, with all other parallel sizes 1."""
    from megatron.core import parallel_state

    from mindspeed_cp import megatron_adaptor

    megatron_adaptor.configure(config)
    parallel_state.initialize_model_parallel(context_parallel_size=config.context_parallel_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _seed(seed: int) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _wrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """``chunk`` in Megatron's wrapper for data parallelism, which reduces gradients; unchanged if it is wrapped."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.utils import get_model_config

    if hasattr(chunk, "ddp_config"):
        return chunk
    config = get_model_config(chunk)
    chunk = chunk.cuda()
    if config.finalize_model_grads_func is None:
        config.finalize_model_grads_func = finalize_model_grads
    wrapped: torch.nn.Module = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk
    )
    return wrapped


def _step(chunks: list[Any], batches: Sequence[Any], forward_step: Callable[..., Any]) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=1,  # read only by pipeline schedules
        micro_batch_size=1,
        forward_only=False,
    )


def _descend(chunks: list[Any]) -> float:
    """One step of plain gradient descent; returns the gradient norm."""
    total = 0.0
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                total += float(parameter.main_grad.double().square().sum())
                parameter.sub_(RATE * parameter.main_grad.to(parameter.dtype))
    return float(total**0.5)
