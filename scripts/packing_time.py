"""Two ranks, measured: data parallel, each with rows of its own, beside one row over both; for ``bench_packing.py``."""

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_attention import sample, step

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention

RANKS = 2
ONE_ROW = {"batch_layout": "balanced", "kv_exchange": "direct"}

Rows = Sequence[Sequence[int]]


def measure(steps: dict[str, tuple[Rows, Rows]], heads: int, head_dim: int, repetitions: int) -> dict[str, list[float]]:
    """name -> seconds of (data parallel, one row over both), medians over the repetitions, which take turns.

    Args:
        steps: name -> (rows for one rank each, dealt out in turn; rows for both), as lengths of documents.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (port, steps, (heads, head_dim), repetitions, results), nprocs=RANKS)
        return dict(results)


def _rank(rank: int, port: int, steps: Any, shape: tuple[int, int], repetitions: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    groups = {
        size: ContextParallelGroups.build(_config(size), [list(range(r, r + size)) for r in range(0, RANKS, size)])
        for size in (1, RANKS)
    }
    for name, (apart, together) in steps.items():
        ways = [
            [_run(rows, 1, groups[1], 0, shape) for rows in apart[rank::RANKS]],
            [_run(rows, RANKS, groups[RANKS], rank, shape) for rows in together],
        ]
        seconds: list[list[float]] = [[], []]
        for repetition in range(repetitions + 1):
            for way, runs in enumerate(ways):
                dist.barrier()
                start = time.perf_counter()
                for run in runs:
                    run()
                dist.barrier()
                if repetition:  # the first is a warm-up
                    seconds[way].append(time.perf_counter() - start)
        if rank == 0:
            results[name] = [statistics.median(each) for each in seconds]
    dist.destroy_process_group()


def _config(size: int) -> ContextParallelConfig:
    return ContextParallelConfig(
        context_parallel_size=size, algorithm="megatron_cp_algo", **(ONE_ROW if size > 1 else {})
    )


def _run(
    lengths: Sequence[int], size: int, groups: ContextParallelGroups, rank: int, shape: tuple[int, int]
) -> Callable[[], None]:
    """Forward and backward of one row."""
    documents, config = (0, *accumulate(lengths)), _config(size)
    layout = SequenceLayout.build(config, documents[-1], documents)
    heads, head_dim = shape
    *tensors, grad = sample((layout.length(rank), heads, head_dim), heads, torch.float32)
    attend = partial(context_parallel_attention, config=config, groups=groups, layout=layout, cu_seqlens=documents)
    return partial(step, attend, tensors, grad)
