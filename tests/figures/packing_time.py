"""Two ranks, measured: data parallel, each with rows of its own, beside one row over both; for ``bench packing``."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench.measuring import attention_of, in_turns, on_ranks, sample, step, timed

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups

RANKS = 2

Rows = Sequence[Sequence[int]]


def measure(steps: dict[str, tuple[Rows, Rows]], heads: int, head_dim: int, repetitions: int) -> dict[str, list[float]]:
    """name -> seconds of (data parallel, one row over both), medians over the repetitions, which take turns.

    Args:
        steps: name -> (rows for one rank each, dealt out in turn; rows for both), as lengths of documents.
    """
    with mp.Manager() as manager:
        results = manager.dict()
        on_ranks(RANKS, _on_rank, steps, (heads, head_dim), repetitions, results)
        return dict(results)


def _on_rank(steps: dict[str, tuple[Rows, Rows]], shape: tuple[int, int], repetitions: int, results: Any) -> None:
    rank = dist.get_rank()
    groups = {
        size: ContextParallelGroups.build(
            _config(size), [list(range(first, first + size)) for first in range(0, RANKS, size)]
        )
        for size in (1, RANKS)
    }
    for name, (apart, together) in steps.items():
        ways = {
            1: [_run(rows, 1, groups[1], 0, shape) for rows in apart[rank::RANKS]],
            RANKS: [_run(rows, RANKS, groups[RANKS], rank, shape) for rows in together],
        }
        found = in_turns({way: partial(timed, partial(_all_of, runs)) for way, runs in ways.items()}, repetitions)
        if rank == 0:
            results[name] = [statistics.median(times.wall for times in found[way]) for way in ways]


def _all_of(runs: Sequence[Callable[[], None]]) -> None:
    for run in runs:
        run()


def _config(size: int) -> ContextParallelConfig:
    if size == 1:
        return ContextParallelConfig()
    return ContextParallelConfig(
        context_parallel_size=size, algorithm="megatron_cp_algo", batch_layout="balanced", kv_exchange="direct"
    )


def _run(
    lengths: Sequence[int], size: int, groups: ContextParallelGroups, rank: int, shape: tuple[int, int]
) -> Callable[[], None]:
    """Forward and backward of one row."""
    documents, config = (0, *accumulate(lengths)), _config(size)
    attend, layout = attention_of(config, documents[-1], documents, groups=groups)
    heads, head_dim = shape
    *tensors, grad = sample(layout.length(rank), heads, heads, head_dim, torch.float32)
    return partial(step, attend, tensors, grad)
