"""Time parts that disappear in a whole run: planning blocks for a new batch, and half precision on a CPU.

``python scripts/bench parts``: milliseconds of one rank to plan its blocks against every shard, for a million tokens
on 32 ranks; and of the CPU kernel's two passes in float32, bfloat16 and float16, with K and V in either order of
memory, beside torch's operator, all interleaved, medians.
"""

import statistics
import time
from functools import partial

import torch
from bench.measuring import head, in_turns, parser_of, row, sample

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.attention.ring_plan import RingPlan
from mindspeed_cp.comm.messages import packed
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.sequence.slice_mask import document_mask


def planning(options):
    """Print a table: documents, layout, milliseconds."""
    tokens, ranks = options.tokens, options.ranks
    print(f"planning the blocks of one rank of {ranks}, {tokens} tokens, causal within documents\n")
    head("documents:", "layout", "ms:")
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
            row(len(documents) - 1, kind, f"{statistics.median(times) * 1e3:.1f}")


def half_precision(options):
    """Print a table: what computes forward and backward, milliseconds, over float32."""
    length, heads, dim = options.seq_length, options.heads, options.head_dim
    kernel, block = select_kernel("cpu"), Block((0, length), (0, length), None, 0)
    settings, whole = KernelOptions(dim**-0.5), sample(length, heads, heads, dim, torch.float32)
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

    def seconds(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    timed = {(name, way): partial(seconds, runs[name][way]) for name in runs for way in (0, 1)}
    times = in_turns(timed, options.repetitions)
    medians = {key: statistics.median(values) for key, values in times.items()}
    base = [medians["the kernel, float32", way] for way in (0, 1)]
    print(f"\ncausal, S={length}, {heads} heads, D={dim}, one thread\n")
    head("computed by", "forward, ms:", "over float32:", "backward, ms:", "over float32:")
    for name in runs:
        figures = ((medians[name, way] * 1e3, medians[name, way] / base[way]) for way in (0, 1))
        row(name, *(text for ms, ratio in figures for text in (f"{ms:.0f}", f"{ratio:.2f}")))


def main():
    options = parser_of(
        __doc__, tokens=1 << 20, ranks=32, seq_length=2048, heads=4, head_dim=64, repetitions=5
    ).parse_args()
    torch.set_num_threads(1)
    planning(options)
    half_precision(options)
