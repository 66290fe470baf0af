"""Time parts that disappear in a whole run: planning blocks for a new batch, and half precision on a CPU.

``python scripts/bench_parts.py``: milliseconds of one rank to plan its blocks against every shard, for a million tokens
on 32 ranks; and of the CPU kernel's two passes in float32, bfloat16 and float16, with K and V in either order of
memory, beside torch's operator, all interleaved, medians.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.attention.ring_plan import RingPlan
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.sequence.slice_mask import document_mask
from mindspeed_cp.comm.messages import packed
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions


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
            layout, mask = SequenceLayout.build(config, tokens, documents), document_mask(None, 0, documents)
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
    """Print a table: what computes forward and backward, milliseconds, over float32."""
    length, heads, dim = options.seq_length, options.heads, options.head_dim
    kernel, block = select_kernel("cpu"), Block((0, length), (0, length), None, 0)
    settings, generator = KernelOptions(dim**-0.5), torch.Generator().manual_seed(0)
    whole = [torch.randn(length, 1, heads, dim, generator=generator) for _ in range(4)]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    operator_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def ours(dtype, order):
        query, key, value, grad_out = (tensor.to(dtype) for tensor in whole)
        key, value = packed((key, value), order)
        tensors = BlockTensors(block, query, key, value)
        result = kernel.forward(tensors, settings)
        rows = AttentionRows(grad_out, result.out, result.lse)
        return (
            lambda: kernel.forward(tensors, settings),
            lambda: kernel.backward(tensors, rows, settings, result.saved),
        )

    def torchs(dtype):
        query, key, value, grad_out = (tensor.to(dtype).permute(1, 2, 0, 3) for tensor in whole)
        out, lse = operator(query, key, value, 0.0, True)
        return (
            lambda: operator(query, key, value, 0.0, True),
            lambda: operator_backward(grad_out, query, key, value, out, lse, 0.0, True),
        )

    runs = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        runs[f"the kernel, {name}"] = ours(dtype, "sequence")
        runs[f"the kernel, {name}, each head of K and V contiguous"] = ours(dtype, "heads")
        runs[f"torch's operator, {name}"] = torchs(dtype)
    times = {(name, way): [] for name in runs for way in (0, 1)}
    for repetition in range(options.repetitions + 1):
        for name, way in times:
            start = time.process_time()
            runs[name][way]()
            if repetition:  # the first is a warm-up
                times[name, way].append(time.process_time() - start)
    medians = {key: statistics.median(values) for key, values in times.items()}
    base = [medians["the kernel, float32", way] for way in (0, 1)]
    print(f"\ncausal, S={length}, {heads} heads, D={dim}, one thread\n")
    print("| computed by | forward, ms | over float32 | backward, ms | over float32 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in runs:
        columns = (f"{medians[name, way] * 1e3:.0f} | {medians[name, way] / base[way]:.2f}" for way in (0, 1))
        print(f"| {name} | {' | '.join(columns)} |")


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
