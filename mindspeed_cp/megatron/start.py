"""The start of a job: ranks compare their settings before they communicate otherwise, and groups get their buffers."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mindspeed_cp.arguments import compared_arguments, compared_config
from mindspeed_cp.comm.hccl import DEFAULT_MEGABYTES, buffers_of
from mindspeed_cp.megatron.decision import Settings
from mindspeed_cp.settings.agreement import SAID, RanksDiffer, agree, versions
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup


def agreed_config(settings: Settings, given: Mapping[str, Any]) -> ContextParallelConfig:
    """The configuration on which all ranks agree; collective over the world.

    Args:
        given: name -> argument of initialize_model_parallel.

    Raises:
        RanksDiffer: this rank's settings are invalid, or ranks have different settings. If the settings are a program's
            flags, the program ends instead, with one line on rank 0.
    """
    config, refusal = None, None
    size, sizes = given.get("context_parallel_size", 1), given.get("hierarchical_context_parallel_sizes")
    try:
        config = _config_for(settings, size, sizes)
    except ValueError as error:
        refusal = str(error)
    compared = _compared(config, settings) | compared_arguments(given) | dict(settings.compared)
    with _ending(settings.program) as say:
        agree(compared, refusal=refusal, say=say)
    assert config is not None
    return config


def agree_in_group(config: ContextParallelConfig, settings: Settings, ranks: Sequence[int]) -> None:
    """Compare the settings of a group's ranks; collective over them.

    Raises:
        RanksDiffer: a rank of the group has other settings.
    """
    agree(_compared(config, settings), ranks=ranks)


def _config_for(settings: Settings, cp_size: int, sizes: Sequence[int] | None) -> ContextParallelConfig:
    """The configuration for the arguments of initialize_model_parallel.

    Raises:
        ValueError: another size was configured, or the settings do not fit this one.
    """
    decision = settings.undecided
    open_size = decision is not None and decision.settings.cp_size in (None, cp_size)
    if open_size and cp_size == 1:
        return ContextParallelConfig(context_parallel_size=1)
    if open_size:
        settings.decide(cp_size, sizes)
    config = settings.config
    assert config is not None
    if config.context_parallel_size != cp_size:
        raise ValueError(
            f"--context-parallel-size {config.context_parallel_size} was configured, and "
            f"initialize_model_parallel got context_parallel_size={cp_size}; pass the same size to both."
        )
    return config


def _compared(config: ContextParallelConfig | None, settings: Settings) -> dict[str, str]:
    from megatron.core import package_info

    megatron = str(getattr(package_info, "__version__", "unknown"))
    found = versions(**{"the version of megatron-core": megatron})
    if config is None:
        return found
    return found | compared_config(
        config,
        settings.setup,
        kernel=settings.kernel,
        documents_from_position_ids=settings.documents_from_position_ids,
        end_of_document=settings.end_of_document,
        image_token_id=settings.image_token_id,
    )


@contextmanager
def _ending(program: str) -> Iterator[Callable[[str], None]]:
    """Yields the function that prints on rank 0; for a program an error becomes exit status 2, else an exception."""

    def say(message: str) -> None:
        if program and message != SAID:
            print(f"{program}: error: {message}", file=sys.stderr, flush=True)

    try:
        yield say
    except RanksDiffer:
        if program:
            raise SystemExit(2) from None
        raise


def hccl_buffers(config: ContextParallelConfig, setup: TrainingSetup | None) -> dict[str, int]:
    """HCCL buffer sizes of the groups that carry attention: MB by group, from the largest message of each.

    Empty on other backends, or if the user has set HCCL_BUFFSIZE, which then applies to every group.
    """
    if setup is None or "hccl" not in dist.get_backend() or os.environ.get("HCCL_BUFFSIZE"):
        return {}
    return buffers_of(config, setup)


def megatron_buffers(config: ContextParallelConfig, setup: TrainingSetup | None) -> dict[str, int]:
    """As ``hccl_buffers``, for the context-parallel group that Megatron makes.

    Megatron's messages travel in it too, of sizes that are not known here: it never gets less than HCCL gives.
    """
    megabytes = hccl_buffers(config, setup).get("cp", 0)
    return {"cp": megabytes} if megabytes > DEFAULT_MEGABYTES else {}
