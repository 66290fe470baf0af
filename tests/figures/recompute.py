"""Time a model of four layers under full recomputation, with and without its attention kept (CPU and gloo).

``python scripts/bench recompute``: forward + backward of the whole model, both ways interleaved in one run, with the
time inside attention and its communication, and how often a layer's attention runs forward.

Medians are of the wall clock and of the processor's time of rank 0.
"""

import statistics
import time
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from bench.measuring import attention_of, head, in_turns, on_ranks, parser_of, row, timed
from torch.utils.checkpoint import checkpoint

from mindspeed_cp import ContextParallelConfig, KeptAttention
from mindspeed_cp.attention.function import AttentionCall, ContextParallelAttention

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


def measure(options):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = ContextParallelConfig(context_parallel_size=ranks, **ALGORITHMS[options.algorithm])
    attend, layout = attention_of(config, options.seq_length)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    layers = [Layer(options.heads, options.head_dim, attend).to(dtype) for _ in range(options.layers)]
    x = torch.randn(layout.length(rank), 1, options.heads * options.head_dim).to(dtype).requires_grad_()

    def run(keeps):
        clock = Clock()
        with clock.running():
            times = timed(partial(step, layers, x, keeps))
        return times.wall, times.cpu, clock.wall, clock.cpu, clock.forwards, times.sent

    found = in_turns({keeps: partial(run, keeps) for keeps in (False, True)}, options.repetitions)
    if rank == 0:
        report(found, ranks, options)


def report(found, ranks, options):
    print(
        f"{options.algorithm}, {ranks} ranks, S={options.seq_length}, {options.layers} layers, H={options.heads}, "
        f"D={options.head_dim}, {options.dtype}, full recomputation, {options.repetitions} interleaved repetitions"
    )
    columns = ("s:", "s in attention:", "its share:", "processor s:", "in attention:", "forward passes:", "MB sent:")
    head("attention", *columns)
    medians = {}
    for keeps, values in found.items():
        wall, cpu, inside, inside_cpu, forwards, sent = medians[keeps] = [*map(statistics.median, zip(*values))]
        seconds = (f"{value:.2f}" for value in (wall, inside, inside / wall, cpu, inside_cpu))
        row("kept" if keeps else "recomputed", *seconds, f"{forwards:.0f}", f"{sent / 1e6:.1f}")
    wall, cpu, inside, inside_cpu, *_ = (
        f"{kept / recomputed:.2f}" for kept, recomputed in zip(medians[True], medians[False])
    )
    row("kept over recomputed", wall, inside, "", cpu, inside_cpu, "", "")


def main():
    parser = parser_of(__doc__, ranks=2, layers=4, seq_length=8192, heads=8, head_dim=64, repetitions=3)
    parser.add_argument("--algorithm", default="ring", choices=ALGORITHMS)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32", "float64"])
    options = parser.parse_args()
    on_ranks(options.ranks, measure, options)
