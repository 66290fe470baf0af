"""Common code of the benchmarks: ranks, interleaved variants, attention and its inputs, tables."""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench import free_port
from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention
from mindspeed_cp.comm import count_bytes
from mindspeed_cp.settings.rules import tokens

Name, Value = TypeVar("Name"), TypeVar("Value")


def parser_of(description: str | None, **sizes: int | None) -> argparse.ArgumentParser:
    """A parser with one flag per size; lengths may be written 128k."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in sizes.items():
        shown = None if default is None else f"default {default}"
        kind = tokens if "length" in name else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=shown)
    return parser


def on_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in ``ranks`` processes, each a gloo rank with one thread."""
    mp.spawn(_rank, (ranks, free_port(), function, arguments), nprocs=ranks)


def _rank(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    function(*arguments)
    dist.destroy_process_group()


def in_turns(runs: Mapping[Name, Callable[[], Value]], repetitions: int) -> dict[Name, list[Value]]:
    """Results of ``runs``, called in turn in each repetition, without the first repetition (warm-up)."""
    found: dict[Name, list[Value]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            value = run()
            if repetition:
                found[name].append(value)
    return found


class Times(NamedTuple):
    """Seconds between two barriers, CPU seconds of this rank, bytes that it sent."""

    wall: float
    cpu: float
    sent: int


def timed(run: Callable[[], object]) -> Times:
    """Call ``run`` on all ranks together."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    with count_bytes() as traffic:
        run()
    cpu = time.process_time() - cpu
    dist.barrier()
    return Times(time.perf_counter() - wall, cpu, traffic.total_bytes)


def attention_of(
    config: ContextParallelConfig, length: int, documents: Sequence[int] | None = None, **options: Any
) -> tuple[Callable[..., torch.Tensor], SequenceLayout]:
    """(attention over a row of this length, the row's layout); collective.

    Args:
        options: further keyword arguments of ``context_parallel_attention``; ``groups`` are built if not given.
    """
    layout = SequenceLayout.build(config, length, documents)
    groups = options.pop("groups", None) or ContextParallelGroups.build(config)
    call = partial(context_parallel_attention, config=config, groups=groups, layout=layout, cu_seqlens=documents)
    return partial(call, **options), layout


def sample(
    length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient, (length, 1, heads, dim)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(length, 1, count, dim, generator=generator).to(device, dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def step(attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor], grad_out: torch.Tensor) -> None:
    """Forward and backward pass of ``attend``, for the caller to time."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    attend(*leaves).backward(grad_out)


def head(*columns: str) -> None:
    """Print the header of a table; a column whose name ends in a colon contains numbers."""
    print("|", " | ".join(column.removesuffix(":") for column in columns), "|")
    print("|", " | ".join("---:" if column.endswith(":") else "---" for column in columns), "|")


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
