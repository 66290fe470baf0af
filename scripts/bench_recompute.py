"""Time a model of four layers under full recomputation, with and without its attention kept (CPU and gloo).

``python scripts/bench_recompute.py``: forward + backward of the whole model, both ways interleaved in one run, with the
time inside attention and its communication, and how often a layer's attention runs forward.

Machines are shared and noisy: every repetition runs both ways once, and medians are printed, of the wall clock and of
the processor's time of rank 0.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from contextlib import contextmanager
from functools import partial
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from mindspeed_cp import (  # noqa: E402
    ContextParallelConfig,
    ContextParallelGroups,
    KeptAttention,
    SequenceLayout,
    context_parallel_attention,
)
from mindspeed_cp.attention.function import AttentionCall, ContextParallelAttention  # noqa: E402
from mindspeed_cp.comm import count_bytes  # noqa: E402

ALGORITHMS = {
    "ring": {"algorithm": "megatron_cp_algo", "send_recv_overlap": True},
    "ulysses": {"algorithm": "ulysses_cp_algo"},
}


class Layer(torch.nn.Module):
    """Attention and a perceptron four times as wide, each behind a norm."""

    def __init__(self, heads, head_dim, attend):
        super().__init__()
        hidden = heads * head_dim
        self.heads, self.attend = heads, attend
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(hidden) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden)
        self.up, self.down = torch.nn.Linear(hidden, 4 * hidden), torch.nn.Linear(4 * hidden, hidden)

    def forward(self, x, kept):
        """x (seq_local, batch, hidden) -> the same shape."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        x = x + self.out(self.attend(*qkv.unbind(2), kept=kept).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


class Clock:
    """Wall time and processor time inside attention, and how often its forward pass computed."""

    def __init__(self):
        self.wall = self.cpu = self.forwards = 0

    @contextmanager
    def running(self):
        def timed(function):
            def call(*args):
                wall, cpu = time.perf_counter(), time.process_time()
                result = function(*args)
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu
                return result

            return call

        compute = AttentionCall.compute
        with (
            mock.patch.object(ContextParallelAttention, "_forward", timed(ContextParallelAttention._forward)),
            mock.patch.object(ContextParallelAttention, "_backward", timed(ContextParallelAttention._backward)),
            mock.patch.object(AttentionCall, "compute", lambda *args: self._count() or compute(*args)),
        ):
            yield

    def _count(self):
        self.forwards += 1


def step(layers, x, keeps):
    for layer in layers:
        kept = KeptAttention() if keeps else None
        context = {"context_fn": kept.contexts} if keeps else {}
        x = checkpoint(layer, x, kept, use_reentrant=False, **context)
    x.square().mean().backward()


def measure(rank, ranks, port, options):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(minutes=5))
    config = ContextParallelConfig(context_parallel_size=ranks, **ALGORITHMS[options.algorithm])
    groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, options.seq_length)
    attend = partial(context_parallel_attention, config=config, groups=groups, layout=layout)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    layers = [Layer(options.heads, options.head_dim, attend).to(dtype) for _ in range(options.layers)]
    x = torch.randn(layout.length(rank), 1, options.heads * options.head_dim).to(dtype).requires_grad_()
    rows = {False: [], True: []}
    for repetition in range(options.repetitions + 1):
        for keeps in rows:
            clock = Clock()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            with clock.running(), count_bytes() as sent:
                step(layers, x, keeps)
            cpu = time.process_time() - cpu
            dist.barrier()
            wall = time.perf_counter() - wall
            if repetition:  # the first is a warm-up
                rows[keeps].append((wall, cpu, clock.wall, clock.cpu, clock.forwards, sent.total_bytes))
    if rank == 0:
        report(rows, ranks, options)
    dist.destroy_process_group()


def report(rows, ranks, options):
    print(
        f"{options.algorithm}, {ranks} ranks, S={options.seq_length}, {options.layers} layers, H={options.heads}, "
        f"D={options.head_dim}, {options.dtype}, full recomputation, {options.repetitions} interleaved repetitions"
    )
    print("| attention | s | s in attention | its share | processor s | in attention | forward passes | MB sent |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    medians = {}
    for keeps, values in rows.items():
        wall, cpu, inside, inside_cpu, forwards, sent = medians[keeps] = [*map(statistics.median, zip(*values))]
        print(
            f"| {'kept' if keeps else 'recomputed'} | {wall:.2f} | {inside:.2f} | {inside / wall:.2f} | {cpu:.2f} | "
            f"{inside_cpu:.2f} | {forwards:.0f} | {sent / 1e6:.1f} |"
        )
    ratios = [kept / recomputed for kept, recomputed in zip(medians[True], medians[False])]
    print(f"| kept over recomputed | {ratios[0]:.2f} | {ratios[2]:.2f} | | {ratios[1]:.2f} | {ratios[3]:.2f} | | |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="ring", choices=ALGORITHMS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    mp.spawn(measure, (options.ranks, 20000 + os.getpid() % 20000, options), nprocs=options.ranks)


if __name__ == "__main__":
    sys.exit(main())
