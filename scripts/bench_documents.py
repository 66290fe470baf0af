"""What packed documents cost a ring: the zigzag of the whole row beside the balanced layout.

``python scripts/bench_documents.py``

For four distributions of document lengths it prints the largest attention area of a rank over the mean and the rows
that cross, both exact, for several numbers of ranks; the time that the kernel takes for the blocks of the rank with
the largest area, alone on this machine; and the time of forward + backward of all ranks together (CPU and gloo).
Variants are interleaved, times are medians. Where ranks share caches and clock, a rank that waits makes the others
faster, and the last table shows less than the one before.
"""

import argparse
import itertools
import os
import random
import socket
import statistics
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_attention import sample, step

from mindspeed_cp import (
    ContextParallelConfig,
    ContextParallelGroups,
    SequenceLayout,
    context_parallel_attention,
)
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.sequence.balance import imbalance
from mindspeed_cp.sequence.blocks import needed_rows
from mindspeed_cp.sequence.slice_mask import document_mask
from mindspeed_cp.comm import count_bytes
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions

# name -> function of a random generator and the row's length that draws a document's length
DISTRIBUTIONS = {
    "short": lambda draw, seq_len: draw.randint(64, 512),
    "lognormal": lambda draw, seq_len: int(draw.lognormvariate(6.5, 1.3)),
    "pareto": lambda draw, seq_len: int(100 * draw.paretovariate(0.9)),
    "one long and many short": lambda draw, seq_len: draw.randint(64, 256),
}
VARIANTS = {
    "zigzag, ring": {"batch_layout": "zigzag"},
    "balanced, auto": {"batch_layout": "balanced", "kv_exchange": "auto"},
}


def boundaries(name: str, seq_len: int, seed: int) -> tuple[int, ...]:
    """cu_seqlens of a row filled with documents of this distribution, in random order."""
    draw = random.Random(seed)
    lengths = [seq_len // 2] if name == "one long and many short" else []
    while sum(lengths) < seq_len:
        lengths.append(max(1, DISTRIBUTIONS[name](draw, seq_len)))
    draw.shuffle(lengths)
    ends = [0]
    for length in lengths:
        ends.append(min(seq_len, ends[-1] + length))
        if ends[-1] == seq_len:
            break
    return tuple(ends)


def config_of(ranks, settings):
    return ContextParallelConfig(
        context_parallel_size=ranks, algorithm="megatron_cp_algo", send_recv_overlap=True, **settings
    )


def plan(name, ranks, settings, options):
    """(largest area over the mean, rows that cross over those of a forwarding ring), means and worst over the seeds."""
    areas, rows = [], []
    for seed in range(options.seeds):
        documents = boundaries(name, options.seq_length, seed)
        layout = SequenceLayout.build(config_of(ranks, settings), options.seq_length, documents)
        runs = [layout.ring_runs(rank) for rank in range(ranks)]
        areas.append(imbalance(runs, documents))
        mask = document_mask(None, 0, documents)
        crossing = sum(
            stop - start
            for reader in range(ranks)
            for source in range(ranks)
            if reader != source
            for start, stop in needed_rows(runs[reader], runs[source], mask)
        )
        rows.append(crossing / options.seq_length / (ranks - 1))
    return statistics.mean(areas), max(areas), statistics.mean(rows)


def busiest(name, ranks, settings, options):
    """(blocks of the rank with the largest area, tokens of a rank)."""
    documents = boundaries(name, options.seq_length, 0)
    layout = SequenceLayout.build(config_of(ranks, settings), options.seq_length, documents)
    blocks = ring_plan(layout, (document_mask(None, 0, documents),), native_bands=False)
    of_rank = [[task.block for source in range(ranks) for task in blocks.tasks(rank, source)] for rank in range(ranks)]
    return max(of_rank, key=lambda blocks: sum(block.area for block in blocks)), layout.ring_length(0)


def kernel_seconds(kernel, tensors, blocks):
    """Forward and backward of these blocks, one after the other."""
    query, key, value, grad_out = tensors
    options, start = KernelOptions(softmax_scale=query.shape[-1] ** -0.5), time.perf_counter()
    for block in blocks:
        rows, keys = block.query_rows, block.key_rows
        tensors = BlockTensors(block, query[rows], key[keys], value[keys])
        result = kernel.forward(tensors, options)
        kernel.backward(tensors, AttentionRows(grad_out[rows], result.out, result.lse), options, result.saved)
    return time.perf_counter() - start


def print_busiest(options):
    print(
        f"\nBusiest rank alone, H={options.heads}, D={options.head_dim}, float32, {options.repetitions} repetitions\n"
    )
    print("| documents | ranks | zigzag ms | balanced ms | zigzag's area over it | zigzag's time over it |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    torch.set_num_threads(1)
    kernel = select_kernel("cpu")
    for name, ranks in itertools.product(DISTRIBUTIONS, options.plans):
        cases = [busiest(name, ranks, settings, options) for settings in VARIANTS.values()]
        tensors = sample((cases[0][1] + 1, options.heads, options.head_dim), options.heads, torch.float32)
        times = [
            [kernel_seconds(kernel, tensors, blocks) for blocks, _ in cases] for _ in range(options.repetitions + 1)
        ]
        zigzag, balanced = (statistics.median(column) for column in zip(*times[1:]))  # the first is a warm-up
        areas = [sum(block.area for block in blocks) for blocks, _ in cases]
        print(
            f"| {name} | {ranks} | {zigzag * 1e3:.1f} | {balanced * 1e3:.1f} | {areas[0] / areas[1]:.2f} "
            f"| {zigzag / balanced:.2f} |",
            flush=True,
        )


def measure(rank, ranks, port, options, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    whole = sample((options.seq_length, options.heads, options.head_dim), options.heads, torch.float32)
    found = {}
    for name in DISTRIBUTIONS:
        documents, cases, sent = boundaries(name, options.seq_length, 0), {}, {}
        for variant, settings in VARIANTS.items():
            config = config_of(ranks, settings)
            groups = ContextParallelGroups.build(config)
            layout = SequenceLayout.build(config, options.seq_length, documents)
            *tensors, grad_out = [layout.shard(tensor, rank).clone() for tensor in whole]
            attend = partial(
                context_parallel_attention, config=config, groups=groups, layout=layout, cu_seqlens=documents
            )
            cases[variant] = partial(step, attend, tensors, grad_out)
        times = {variant: [] for variant in cases}
        for repetition in range(options.repetitions + 1):
            for variant, run in cases.items():
                dist.barrier()
                start = time.perf_counter()
                with count_bytes() as traffic:
                    run()
                dist.barrier()
                sent[variant] = traffic.total_bytes
                if repetition:  # the first is a warm-up
                    times[variant].append(time.perf_counter() - start)
        found[name] = {v: (statistics.median(times[v]), sent[v]) for v in cases}
    if rank == 0:
        results.update(found)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks that are timed")
    parser.add_argument("--plans", type=int, nargs="+", default=[2, 4, 8, 16], help="ranks that are planned")
    parser.add_argument("--seq-length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=6, help="rows drawn for each plan")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    print(f"S={options.seq_length}, causal within documents, {options.seeds} rows of each distribution\n")
    print("| documents | ranks | variant | largest / mean area | worst | rows that any rank needs / all |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for name in DISTRIBUTIONS:
        for ranks in options.plans:
            for variant, settings in VARIANTS.items():
                mean, worst, rows = plan(name, ranks, settings, options)
                print(f"| {name} | {ranks} | {variant} | {mean:.2f} | {worst:.2f} | {rows:.2f} |", flush=True)
    print_busiest(options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(measure, (options.ranks, port, options, results), nprocs=options.ranks)
        print(
            f"\n{options.ranks} ranks, H={options.heads}, D={options.head_dim}, float32, forward + backward, "
            f"{options.repetitions} interleaved repetitions\n"
        )
        print("| documents | variant | median ms | MB sent by rank 0 | zigzag's time over it |")
        print("| --- | --- | ---: | ---: | ---: |")
        for name, found in results.items():
            base = found["zigzag, ring"][0]
            for variant, (median, sent) in found.items():
                print(f"| {name} | {variant} | {median * 1e3:.1f} | {sent / 1e6:.2f} | {base / median:.2f} |")


if __name__ == "__main__":
    main()
