"""What packed documents cost a ring: the zigzag of the whole row beside the balanced layout.

``python scripts/bench documents``

For four distributions of document lengths it prints the largest attention area of a rank over the mean and the rows
that cross, both exact, for several numbers of ranks; the time that the kernel takes for the blocks of the rank with
the largest area, alone on this machine; and the time of forward + backward of all ranks together (CPU and gloo). Where
ranks share caches and clock, a rank that waits makes the others faster, and the last table shows less than the one
before.
"""

import itertools
import random
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from bench.measuring import attention_of, head, in_turns, on_ranks, parser_of, row, sample, step, timed

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions
from mindspeed_cp.sequence.balance import imbalance
from mindspeed_cp.sequence.blocks import needed_rows
from mindspeed_cp.sequence.slice_mask import document_mask

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
        mask = document_mask(None, 0, documents)
        areas.append(imbalance(layout.rings, mask))
        crossing = sum(
            stop - start
            for reader in range(ranks)
            for source in range(ranks)
            if reader != source
            for start, stop in needed_rows(layout.rings[reader], layout.rings[source], mask)
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


def print_plans(options):
    print(f"S={options.seq_length}, causal within documents, {options.seeds} rows of each distribution\n")
    head("documents", "ranks:", "variant", "largest / mean area:", "worst:", "rows that any rank needs / all:")
    for name, ranks, variant in itertools.product(DISTRIBUTIONS, options.plans, VARIANTS):
        mean, worst, rows = plan(name, ranks, VARIANTS[variant], options)
        row(name, ranks, variant, f"{mean:.2f}", f"{worst:.2f}", f"{rows:.2f}")


def print_busiest(options):
    print(
        f"\nBusiest rank alone, H={options.heads}, D={options.head_dim}, float32, {options.repetitions} repetitions\n"
    )
    head("documents", "ranks:", "zigzag ms:", "balanced ms:", "zigzag's area over it:", "zigzag's time over it:")
    torch.set_num_threads(1)
    kernel = select_kernel("cpu")
    for name, ranks in itertools.product(DISTRIBUTIONS, options.plans):
        cases = {variant: busiest(name, ranks, settings, options) for variant, settings in VARIANTS.items()}
        length = next(iter(cases.values()))[1] + 1
        tensors = sample(length, options.heads, options.heads, options.head_dim, torch.float32)
        runs = {variant: partial(kernel_seconds, kernel, tensors, blocks) for variant, (blocks, _) in cases.items()}
        times = in_turns(runs, options.repetitions)
        zigzag, balanced = map(statistics.median, times.values())
        areas = [sum(block.area for block in blocks) for blocks, _ in cases.values()]
        ratios = f"{areas[0] / areas[1]:.2f}", f"{zigzag / balanced:.2f}"
        row(name, ranks, f"{zigzag * 1e3:.1f}", f"{balanced * 1e3:.1f}", *ratios)


def measure(options):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = sample(options.seq_length, options.heads, options.heads, options.head_dim, torch.float32)
    if rank == 0:
        print(
            f"\n{ranks} ranks, H={options.heads}, D={options.head_dim}, float32, forward + backward, "
            f"{options.repetitions} interleaved repetitions\n"
        )
        head("documents", "variant", "median ms:", "MB sent by rank 0:", "zigzag's time over it:")
    for name in DISTRIBUTIONS:
        documents, cases = boundaries(name, options.seq_length, 0), {}
        for variant, settings in VARIANTS.items():
            attend, layout = attention_of(config_of(ranks, settings), options.seq_length, documents)
            *tensors, grad_out = [layout.shard(tensor, rank).clone() for tensor in whole]
            cases[variant] = partial(timed, partial(step, attend, tensors, grad_out))
        found = in_turns(cases, options.repetitions)
        base = None
        for variant, values in found.items():
            median, sent = statistics.median(times.wall for times in values), values[-1].sent
            base = base or median
            if rank == 0:
                row(name, variant, f"{median * 1e3:.1f}", f"{sent / 1e6:.2f}", f"{base / median:.2f}")


def main():
    parser = parser_of(__doc__, ranks=2, seq_length=16384, heads=4, head_dim=64, seeds=6, repetitions=5)
    parser.add_argument("--plans", type=int, nargs="+", default=[2, 4, 8, 16], help="ranks that are planned")
    options = parser.parse_args()
    print_plans(options)
    print_busiest(options)
    on_ranks(options.ranks, measure, options)
