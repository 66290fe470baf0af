"""Time context-parallel attention on this machine (CPU and gloo), variants interleaved in one run.

``python scripts/bench_attention.py``            forward + backward over the ideal T(1 rank) / ranks, per algorithm,
                                                 beside the floor: all ranks compute their share of the heads, without
                                                     communication; T(1 rank) is this project's kernel and, in a column
                                                     of its own, torch's operator as it is
``python scripts/bench_attention.py --stub``     communication, merging and copying alone: the kernel returns empty
                                                 outputs, CPU time per rank, beside a straightforward reference ring

Machines are shared and noisy: every repetition runs every variant once, and medians are printed. Set OMP_NUM_THREADS=1
(the default here) so that ranks do not compete for cores.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from mindspeed_cp import (  # noqa: E402
    ContextParallelConfig,
    ContextParallelGroups,
    SequenceLayout,
    context_parallel_attention,
)
from mindspeed_cp.comm import count_bytes  # noqa: E402
from mindspeed_cp.kernels import select_kernel  # noqa: E402
from mindspeed_cp.kernels.base import AttentionKernel, BlockResult, BlockTensors  # noqa: E402


FLOOR = "floor: no communication"
TORCH = "torch's operator"


class StubKernel(AttentionKernel):
    """Returns outputs of the right shapes that were made once, so that only communication, merging and copying are
    left.
    """

    name, native_bands = "stub", True

    def __init__(self, order="heads"):
        self._outputs, self._order = {}, order

    def memory_order(self, dtype):
        return self._order

    def output(self, name, shape, dtype):
        key = (name, tuple(shape), dtype)
        if key not in self._outputs:
            self._outputs[key] = torch.zeros(shape, dtype=dtype)
        return self._outputs[key]

    def forward(self, tensors, options):
        query, value = tensors.query, tensors.value
        lse = self.output("lse", query.shape[:3], torch.float32)
        return BlockResult(self.output("out", (*query.shape[:3], value.shape[-1]), query.dtype), lse.clone())

    def backward(self, tensors, rows, options, saved):
        likes = (("dq", tensors.query), ("dk", tensors.key), ("dv", tensors.value))
        return tuple(self.output(name, like.shape, like.dtype) for name, like in likes)


def variants(ranks):
    """name -> settings of ContextParallelConfig."""
    ring = {"algorithm": "megatron_cp_algo", "send_recv_overlap": True}
    table = {
        "ulysses": {"algorithm": "ulysses_cp_algo"},
        "ring": ring,
        "ring direct": {**ring, "kv_exchange": "direct"},
        "kv all-gather": {"algorithm": "kvallgather_cp_algo"},
    }
    if ranks % 2 == 0 and ranks > 2:
        table["double ring w=2"] = {**ring, "window_size": 2}
        table["hybrid u=2"] = {**ring, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2}
    return table


def sample(shape, kv_heads, dtype, seed=0):
    """query, key, value and the output's gradient of the whole sequence."""
    seq, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(seq, 1, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def torch_attention(query, key, value):
    """torch's own attention of the whole sequence, on one rank."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return out.permute(2, 0, 1, 3)


def step(attend, tensors, grad_out):
    """Forward and backward of ``attend``; returns nothing, the caller times it."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    attend(*leaves).backward(grad_out)


def reference_ring_step(query, key, value, grad_out, kernel, group, rank):
    """A straightforward ring with a stubbed kernel: K and V sent separately, fresh buffers, merging out of place.

    Forward passes K and V on; backward passes them on again together with their summed gradients, cp times.
    """
    ranks = group.size()

    def rotate(tensors):
        received = [torch.empty_like(tensor) for tensor in tensors]
        ops = [
            op
            for tensor, into in zip(tensors, received)
            for op in (
                dist.P2POp(dist.isend, tensor, (rank + 1) % ranks, group),
                dist.P2POp(dist.irecv, into, (rank - 1) % ranks, group),
            )
        ]
        return dist.batch_isend_irecv(ops), received

    half, out, lse = query.shape[0] // 2, None, None
    local = (key.contiguous(), value.contiguous())
    everything, first, second = slice(None), slice(half), slice(half, None)
    blocks = [
        (everything, everything) if t == 0 else (everything, first) if t <= rank else (second, everything)
        for t in range(ranks)
    ]
    kv = local
    for t, (rows, _) in enumerate(blocks):
        works, following = rotate(kv) if t + 1 < ranks else ((), None)
        block_out, block_lse, *_ = kernel.forward(BlockTensors(None, query[rows], None, value), None)
        block_out, block_lse = block_out.float(), block_lse.unsqueeze(-1)
        if out is None:
            out, lse = block_out, block_lse
        else:
            merged = out[rows] - torch.sigmoid(block_lse - lse[rows]) * (out[rows] - block_out)
            merged_lse = lse[rows] - torch.nn.functional.logsigmoid(lse[rows] - block_lse)
            out, lse = out.clone(), lse.clone()
            out[rows], lse[rows] = merged, merged_lse
        for work in works:
            work.wait()
        kv = following
    out = out.to(query.dtype)
    kv, dq, pending, arriving = local, None, (), None
    for t, (rows, keys) in enumerate(blocks):
        works, following = rotate(kv) if t + 1 < ranks else ((), None)
        part = kernel.backward(BlockTensors(None, query[rows], key[keys], value[keys]), None, None, None)
        if dq is None:
            dq, dkv = part[0].float(), [part[1].float(), part[2].float()]
        else:
            dq[rows] += part[0]
            for work in pending:
                work.wait()
            dkv = [grad.clone() for grad in arriving]
            for grad, piece in zip(dkv, part[1:]):
                grad[keys] += piece
        for work in works:
            work.wait()
        kv = following
        pending, arriving = rotate(dkv)
    for work in pending:
        work.wait()
    return out, dq.to(query.dtype), arriving[0].to(key.dtype), arriving[1].to(key.dtype)


def measure(rank, ranks, port, options):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(minutes=5))
    whole = sample(
        (options.seq_length, options.heads, options.head_dim), options.kv_heads, getattr(torch, options.dtype)
    )
    kernel = StubKernel() if options.stub else select_kernel("cpu")
    cases, traffic = {}, {}
    for name, settings in variants(ranks).items():
        config = ContextParallelConfig(context_parallel_size=ranks, **settings)
        groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, options.seq_length)
        *tensors, grad_out = [layout.shard(tensor, rank).clone() for tensor in whole]
        attend = partial(context_parallel_attention, config=config, groups=groups, layout=layout, kernel=kernel)
        cases[name] = partial(step, attend, tensors, grad_out)
    if options.stub:
        cases["reference ring"] = partial(reference_ring_step, *tensors, grad_out, kernel, groups.cp_group, rank)
    else:
        config = ContextParallelConfig()
        single = partial(
            context_parallel_attention,
            config=config,
            groups=ContextParallelGroups.build(config),
            layout=SequenceLayout.build(config, options.seq_length),
            kernel=kernel,
        )
        for name, attend in (("1 rank", single), (TORCH, torch_attention)):
            cases[name] = partial(step, attend, whole[:3], whole[3]) if rank == 0 else (lambda: None)
        if options.kv_heads % ranks == 0:
            share = [
                tensor.chunk(ranks, dim=2)[rank].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
                for tensor in whole
            ]
            cases[FLOOR] = partial(step, single, share[:3], share[3])
    times = {name: [] for name in cases}
    for repetition in range(options.repetitions + 1):
        for name, run in cases.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            with count_bytes() as sent:
                run()
            cpu = time.process_time() - cpu
            dist.barrier()
            traffic[name] = torch.tensor(float(sent.total_bytes))
            dist.all_reduce(traffic[name])
            if repetition:  # the first is a warm-up
                times[name].append(cpu if options.stub else time.perf_counter() - wall)
    if rank == 0:
        report(times, traffic, ranks, options)
    dist.destroy_process_group()


def report(times, traffic, ranks, options):
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{ranks} ranks, S={options.seq_length}, H={options.heads}, KV heads={options.kv_heads}, D={options.head_dim}, "
        f"{options.dtype}, forward + backward, {options.repetitions} interleaved repetitions"
    )
    base = medians.pop("reference ring") if options.stub else medians.pop("1 rank") / ranks
    label = "reference ring, CPU time per rank" if options.stub else f"ideal T(1 rank) / {ranks}"
    columns = {f"over {label}": base}
    if not options.stub:
        columns[f"over {TORCH}: T(1 rank) / {ranks}"] = medians.pop(TORCH) / ranks
    print(f"| variant | median ms | {' | '.join(columns)} | mean MB sent per rank |")
    print(f"| --- | ---: | {'---: | ' * len(columns)}---: |")
    for name, median in {label: base, **medians}.items():
        ratios = " | ".join(f"{median / of:.2f}" for of in columns.values())
        sent = f"{traffic[name] / ranks / 1e6:.1f}" if name in traffic else ""
        print(f"| {name} | {median * 1e3:.1f} | {ratios} | {sent} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=None, help="default 2, with --stub 4")
    parser.add_argument("--seq-length", type=int, default=None, help="default 4096, with --stub 8192")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--stub", action="store_true", help="stub the kernel and print CPU time per rank")
    options = parser.parse_args()
    options.ranks = options.ranks or (4 if options.stub else 2)
    options.seq_length = options.seq_length or (8192 if options.stub else 4096)
    options.kv_heads = options.kv_heads or options.heads
    mp.spawn(measure, (options.ranks, 20000 + os.getpid() % 20000, options), nprocs=options.ranks)


if __name__ == "__main__":
    sys.exit(main())
