"""Time parts that disappear in a whole run: planning blocks for a new batch, and half precision on a CPU.

``python scripts/bench_parts.py``: milliseconds of one rank to plan its blocks against every shard, for a million tokens
on 32 ranks; and of the CPU kernel's backward pass in bfloat16 and float32, beside torch's operator in bfloat16, the
three interleaved, medians.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.algorithms.ring_plan import RingPlan
from mindspeed_cp.blocks import Block, IntervalMask
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import KernelOptions


def planning(options):
    """Print a table: documents, layout, milliseconds."""
    tokens, ranks = options.tokens, options.ranks
    print(f"planning the blocks of one rank of {ranks}, {tokens} tokens, causal within documents\n")
    print("| documents | layout | ms |\n| ---: | --- | ---: |")
    for count in (2_000, 20_000):
        documents = (*range(0, tokens, -(-tokens // count)), tokens)
        for kind in ("zigzag", "balanced"):
            config = ContextParallelConfig(
                context_parallel_size=ranks, algorithm="megatron_cp_algo", batch_layout=kind, kv_exchange="direct"
            )
            layout, mask = SequenceLayout.build(config, tokens, documents), IntervalMask(None, 0, documents)
            times = []
            for _ in range(options.repetitions):
                start, plan = time.perf_counter(), RingPlan(layout, (mask,), False, exact=True)
                for source in range(ranks):
                    plan.tasks(0, source)
                    plan.rows_needed(0, source)
                    plan.rows_needed(source, 0)
                times.append(time.perf_counter() - start)
            print(f"| {len(documents) - 1} | {kind} | {statistics.median(times) * 1e3:.1f} |", flush=True)


def half_precision(options):
    """Print a table: what computes the backward pass, milliseconds, over float32."""
    length, heads, dim = options.seq_length, options.heads, options.head_dim
    kernel, block = select_kernel("cpu"), Block((0, length), (0, length), None, 0)
    settings, generator = KernelOptions(dim**-0.5), torch.Generator().manual_seed(0)
    whole = [torch.randn(length, 1, heads, dim, generator=generator) for _ in range(4)]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    operator_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def ours(dtype):
        query, key, value, grad_out = (tensor.to(dtype) for tensor in whole)
        out, lse, rng = kernel.forward(query, key, value, block, settings)
        return lambda: kernel.backward(grad_out, query, key, value, out, lse, block, settings, rng)

    def torchs(dtype):
        query, key, value, grad_out = (tensor.to(dtype).permute(1, 2, 0, 3) for tensor in whole)
        out, lse = operator(query, key, value, 0.0, True)
        return lambda: operator_backward(grad_out, query, key, value, out, lse, 0.0, True)

    runs = {
        "the kernel, float32": ours(torch.float32),
        "the kernel, bfloat16": ours(torch.bfloat16),
        "torch's operator, bfloat16": torchs(torch.bfloat16),
    }
    times = {name: [] for name in runs}
    for repetition in range(options.repetitions + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repetition:  # the first is a warm-up
                times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["the kernel, float32"]
    print(f"\nbackward pass, causal, S={length}, {heads} heads, D={dim}, one thread\n")
    print("| computed by | ms | over float32 |\n| --- | ---: | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {median * 1e3:.0f} | {median / base:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=2048, help="of the backward pass")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    planning(options)
    half_precision(options)


if __name__ == "__main__":
    main()
