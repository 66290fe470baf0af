"""Time an attention kernel in the blocks of a ring rank against the whole sequence in one call, on one device.

``python scripts/bench kernels``                 S = 8k, 32k, 128k on an accelerator, small sizes on a CPU
``python scripts/bench kernels --kernel cudnn``  another kernel of the same device

Per length: time of forward + backward of all blocks that one of ``--ranks`` ring ranks computes, merging included,
divided by the same share of the whole causal attention; 1.00 would mean that splitting the sequence costs nothing.
Communication is not included.
Rank 0 is simulated in this process and timed; with zigzag all ranks have the same area.
"""

import os
import platform
import statistics
import time
from functools import partial

import torch

from bench.measuring import head, in_turns, parser_of, row, sample
from mindspeed_cp.attention.merging import plain_merge
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions, accumulation_dtype
from mindspeed_cp.patches.machine.choice import DEVICE_VARIABLE, device_type
from mindspeed_cp.sequence.blocks import Block, plan_blocks
from mindspeed_cp.sequence.slice_mask import document_mask
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.rules import tokens

SIZES = {True: (4, 1, 32), False: (32, 8, 128)}  # heads, KV heads, head dimension; small ones on a CPU


def parse_args(argv=None):
    parser = parser_of(__doc__, ranks=8, heads=None, kv_heads=None, head_dim=None, repeat=5)
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], help="default: the accelerator, else cpu")
    parser.add_argument("--kernel", help="as --cp-kernel; default: chosen by the device")
    parser.add_argument("--lengths", type=tokens, nargs="+", help="default: 8192 32768 131072, on a CPU 512 1024 2048")
    parser.add_argument("--fused-merge", action="store_true", help="merge by the kernel's own operator")
    args = parser.parse_args(argv)
    args.device = args.device or device_type(os.environ.get(DEVICE_VARIABLE, ""))
    small = args.device == "cpu"
    args.lengths = args.lengths or ([512, 1024, 2048] if small else [8192, 32768, 131072])
    for name, value in zip(("heads", "kv_heads", "head_dim"), SIZES[small], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Clock:
    """Measures seconds on a device; waits for the device before reading the time."""

    def __init__(self, device):
        self._wait = (lambda: None) if device == "cpu" else getattr(torch, device).synchronize

    def __call__(self, function):
        self._wait()
        start = time.perf_counter()
        result = function()
        self._wait()
        return time.perf_counter() - start, result


class RingRank:
    """Rank 0 of the simulated ring: its queries, and one shard of keys that is used for every rank's."""

    def __init__(self, args, kernel, length):
        config = ContextParallelConfig(context_parallel_size=args.ranks, algorithm="megatron_cp_algo")
        layout, mask = SequenceLayout.build(config, length), document_mask(right=0)
        self.plans = [
            plan_blocks(layout.ring_runs(0), layout.ring_runs(source), mask, kernel.native_bands)
            for source in range(args.ranks)
        ]
        self.kernel, self.tensors = kernel, tensors_of(args, layout.length(0))
        self.merge = kernel.merge if args.fused_merge else plain_merge

    def step(self, clock):
        """(seconds in the kernel, seconds of merging) of one forward and backward pass."""
        query, key, value, grad_out = self.tensors
        options, dtype = KernelOptions(query.shape[-1] ** -0.5), accumulation_dtype(query.dtype)
        out = query.new_zeros(grad_out.shape, dtype=dtype)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        kernel_seconds = merge_seconds = 0.0
        blocks, rngs = [block for plan in self.plans for block in plan], []
        for block in blocks:
            q, k = block.query_rows, block.key_rows
            seconds, part = clock(
                partial(self.kernel.forward, BlockTensors(block, query[q], key[k], value[k]), options)
            )
            kernel_seconds += seconds
            merge_seconds += clock(partial(self.merge, out[q], lse[q], None, part))[0]
            rngs.append(part.saved)
        out = out.to(query.dtype)
        for block, rng in zip(blocks, rngs, strict=True):
            q, k = block.query_rows, block.key_rows
            tensors, rows = BlockTensors(block, query[q], key[k], value[k]), AttentionRows(grad_out[q], out[q], lse[q])
            kernel_seconds += clock(partial(self.kernel.backward, tensors, rows, options, rng))[0]
        return kernel_seconds, merge_seconds


def tensors_of(args, length):
    return sample(length, args.heads, args.kv_heads, args.head_dim, torch.bfloat16, args.device)


def whole_step(kernel, tensors, clock):
    """Seconds of one causal forward and backward pass over the whole sequence."""
    query, key, value, grad_out = tensors
    block, options = Block((0, len(query)), (0, len(query)), None, 0), KernelOptions(query.shape[-1] ** -0.5)
    tensors = BlockTensors(block, query, key, value)
    forward, result = clock(partial(kernel.forward, tensors, options))
    rows = AttentionRows(grad_out, result.out.to(query.dtype), result.lse)
    return forward + clock(partial(kernel.backward, tensors, rows, options, result.saved))[0]


def measure(args, kernel, length):
    """Medians (whole seconds, kernel seconds of the blocks, merge seconds)."""
    clock, rank, tensors = Clock(args.device), RingRank(args, kernel, length), tensors_of(args, length)
    steps = {"whole": lambda: (whole_step(kernel, tensors, clock),), "blocks": lambda: rank.step(clock)}
    found = in_turns(steps, args.repeat)
    return [statistics.median(column) for values in found.values() for column in zip(*values)]


def hardware(args):
    if args.device == "cpu":
        name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    else:
        name = getattr(torch, args.device).get_device_name()
    return f"{name}, torch {torch.__version__}"


def main(argv=None):
    args = parse_args(argv)
    kernel = select_kernel(args.kernel, args.device)
    if args.fused_merge and not kernel.has_fused_merge:
        raise SystemExit(f"--fused-merge: kernel {kernel.name} has no fused update on this machine; leave it out.")
    print(
        f"kernel {kernel.name} on {hardware(args)}; bf16, {args.heads} heads, {args.kv_heads} KV heads, "
        f"head dimension {args.head_dim}, forward + backward, medians of {args.repeat}\n"
    )
    columns = ("whole attention, ms", f"1/{args.ranks} of it, ms", "ring blocks of a rank, ms", "merge, ms")
    head("S", *columns, "ratio", "merge share")
    for length in args.lengths:
        whole, blocks, merge = measure(args, kernel, length)
        ratio, share = (blocks + merge) * args.ranks / whole, merge / (blocks + merge)
        times = (f"{seconds * 1e3:.2f}" for seconds in (whole, whole / args.ranks, blocks, merge))
        row(length, *times, f"{ratio:.2f}", f"{share:.1%}")
