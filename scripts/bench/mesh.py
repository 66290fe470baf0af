"""Time the exchanges on an emulated full mesh: every pair of ranks has a link of its own, with a rate of its own.

``python scripts/bench mesh 4 20mbit``     as root, or with the right to make network namespaces; else status 77

Each rank is alone on its host; gloo, kernels stubbed: communication alone counts. Prints for each exchange the time of
a forward pass, and of forward and backward, over the floor: its own bytes, if all links carried all the time. "With a
kernel" is one that takes as long as the exchange. Rates at which two cores keep up: 20mbit for 4 ranks, 10mbit for 8.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bench.measuring import StubKernel, head, in_turns, parser_of, row
from bench.network import REFUSED, Network, bits_per_second, mesh, mesh_device
from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention
from mindspeed_cp.comm import count_bytes

HEADS, HEAD_DIM, PORT = 32, 16, 29777


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
        calls[name] = dict(
            config=config,
            groups=ContextParallelGroups.build(config, share_from=None),
            layout=SequenceLayout.build(config, local * ranks),
            kernel=StubKernel(None, exchange * ranks / HEADS if "kernel" in name else 0.0),
        )

    def run(keywords: dict[str, Any]) -> list[float]:
        """Seconds of the forward pass and of both on the slowest rank, bytes of all."""
        dist.barrier()
        start = time.perf_counter()
        with count_bytes() as traffic:
            out = context_parallel_attention(*leaves, **keywords)
            forward = time.perf_counter() - start
            out.backward(out)
        taken = torch.tensor([forward, time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        total = torch.tensor([traffic.total_bytes], dtype=torch.float64)
        dist.all_reduce(total)
        return [*taken.tolist(), *total.tolist()]

    found = in_turns({name: partial(run, keywords) for name, keywords in calls.items()}, options.repetitions)
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


def on_all_hosts(network: Network, command: list[str]) -> str:
    """What rank 0 prints of ``command``, run as a rank on each host.

    Raises:
        RuntimeError: a rank failed; the message is what it said.
    """
    files = [tempfile.TemporaryFile("w+") for _ in network.hosts]
    processes = [network.start(host, 1, command, PORT, stdout=file, stderr=file) for host, file in enumerate(files)]
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = []
    for file in files:
        file.seek(0)
        printed.append(file.read())
    if any(codes):
        raise RuntimeError(next(text for code, text in zip(codes, printed) if code))
    return printed[0]


def sent_by_link(network: Network) -> list[list[int]]:
    """Bytes that left each rank's end of its link to each other, headers included."""
    every = range(len(network.hosts))
    return [[network.sent(me, mesh_device(me, peer)) if me != peer else 0 for peer in every] for me in every]


def main() -> int:
    parser = parser_of(__doc__, seq_length=None, kv_heads=HEADS, repetitions=3)
    parser.add_argument("ranks", type=int, metavar="N")
    parser.add_argument("rate", metavar="RATE", help="of a link, such as 20mbit, or none")
    parser.add_argument("--only", default="", help="names of rows, with semicolons between them")
    parser.add_argument("--count", action="store_true", help="print what every link carried, as rows of JSON")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seq_length = options.seq_length or 512 * options.ranks
    options.bits = None if options.rate == "none" else bits_per_second(options.rate)
    if options.in_namespace:
        measure(options)
        return 0
    try:
        with mesh(options.ranks, options.rate if options.bits else None) as network:
            before = sent_by_link(network)
            print(on_all_hosts(network, [sys.executable, *sys.orig_argv[1:], "--in-namespace"]), end="", flush=True)
            if options.count:
                print([[b - a for a, b in zip(*rows)] for rows in zip(before, sent_by_link(network))])
    except PermissionError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0
