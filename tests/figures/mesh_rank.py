"""A rank of scripts/bench mesh: the exchanges, timed in turns."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from bench.measuring import attention_of, head, in_turns, row

from figures.stubbed import StubKernel
from mindspeed_cp import ContextParallelConfig, ContextParallelGroups
from mindspeed_cp.comm import count_bytes

HEADS, HEAD_DIM = 32, 16


def variants(ranks: int) -> dict[str, dict]:
    ring = {"algorithm": "megatron_cp_algo", "send_recv_overlap": True}
    direct, mesh_exchange = ({**ring, "kv_exchange": exchange} for exchange in ("direct", "mesh"))
    full = {"attention_mask_type": "full"}
    table = {
        "ring": ring,
        "kv all-gather": {"algorithm": "kvallgather_cp_algo", "send_recv_overlap": True},
        "direct": direct,
        "direct, all in flight": {**direct, "in_flight": ranks - 1},
        "mesh": mesh_exchange,
        "mesh, 2 in flight": {**mesh_exchange, "in_flight": 2},
        "ring, full mask": {**ring, **full},
        "mesh, full mask": {**mesh_exchange, **full},
    }
    if HEADS % ranks == 0:
        table["ulysses"] = {"algorithm": "ulysses_cp_algo"}
        table["ulysses with a kernel"] = {"algorithm": "ulysses_cp_algo"}
        for chunks in (2, 4, 8):
            if chunks <= HEADS // ranks:
                settings = {"algorithm": "ulysses_cp_algo", "ulysses_chunks": chunks}
                table[f"ulysses with a kernel, {chunks} chunks"] = settings
    return table


def measure(options: argparse.Namespace) -> None:
    """One rank of the benchmark."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    local = options.seq_length // ranks
    leaves = [
        torch.randn(local, 1, heads, HEAD_DIM, dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, options.kv_heads, options.kv_heads)
    ]
    # Four tensors of a rank's heads in all, of which each link carries one share.
    exchange = 4 * local * HEADS / ranks * HEAD_DIM * 16 / options.bits if options.bits else 0
    calls = {}
    for name, settings in variants(ranks).items():
        if options.only and name not in options.only.split(";"):
            continue
        config = ContextParallelConfig(context_parallel_size=ranks, **settings)
        kernel = StubKernel(None, exchange * ranks / HEADS if "kernel" in name else 0.0)
        groups = ContextParallelGroups.build(config, share_from=None)
        calls[name] = attention_of(config, local * ranks, groups=groups, kernel=kernel)[0]

    def run(attend: Callable[..., torch.Tensor]) -> list[float]:
        """Seconds of the forward pass and of both on the slowest rank, bytes of all."""
        dist.barrier()
        start = time.perf_counter()
        with count_bytes() as traffic:
            out = attend(*leaves)
            forward = time.perf_counter() - start
            out.backward(out)
        taken = torch.tensor([forward, time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        total = torch.tensor([traffic.total_bytes], dtype=torch.float64)
        dist.all_reduce(total)
        return [*taken.tolist(), *total.tolist()]

    found = in_turns({name: partial(run, attend) for name, attend in calls.items()}, options.repetitions)
    if dist.get_rank() == 0:
        report(found, ranks, options)
    dist.destroy_process_group()


def report(found: dict[str, list[list[float]]], ranks: int, options: argparse.Namespace) -> None:
    print(
        f"{ranks} ranks, {ranks - 1} links each of {options.rate}, S={options.seq_length}, bf16, {HEADS} heads, "
        f"{options.kv_heads} KV heads, kernels stubbed; median of {options.repetitions}"
    )
    columns = ("forward ms:", "forward + backward ms:", "MiB a rank:", "over the floor of its bytes:", "over the ring:")
    head("exchange", *columns)
    medians = {name: [*map(statistics.median, zip(*values))] for name, values in found.items()}
    for name, (forward, both, sent) in medians.items():
        over_floor = f"{both / (sent * 8 / (ranks * (ranks - 1)) / options.bits):.2f}" if options.bits else ""
        over_ring = f"{both / medians['ring'][1]:.2f}" if "ring" in medians else ""
        row(name, f"{1e3 * forward:.0f}", f"{1e3 * both:.0f}", f"{sent / ranks / 2**20:.2f}", over_floor, over_ring)
