"""A rank of tests/check hosts: one attention layer, the bytes that it sends to the other host, and its errors."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention
from mindspeed_cp.comm import count_bytes

HEADS, KV_HEADS, DIM = 8, 4, 64
RUNNING = "running"
COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")  # of the host that a rank is on
CONFIGS = {
    "hybrid": dict(algorithm="hybrid_cp_algo", ulysses_degree=2),
    "double_ring": dict(algorithm="megatron_cp_algo", window_size=2),
}


class HostMeter:
    """Counts the bytes that this rank hands to torch.distributed for ranks of another host; use it as a context
    manager.
    """

    def __init__(self, ranks_per_host):
        self.host, self.ranks_per_host, self.bytes = dist.get_rank() // ranks_per_host, ranks_per_host, 0

    def __enter__(self):
        self._originals = dist.batch_isend_irecv, dist.all_to_all_single

        def batch_isend_irecv(ops):
            for op in ops:
                if op.op is dist.isend and self._is_elsewhere(op.peer):
                    self.bytes += op.tensor.numel() * op.tensor.element_size()
            return self._originals[0](ops)

        def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, **kwargs):
            ranks = dist.get_process_group_ranks(group)
            sizes = input_split_sizes or [input.shape[0] // len(ranks)] * len(ranks)
            row = input.element_size() * (input[0].numel() if input.dim() > 1 else 1)
            self.bytes += sum(size * row for rank, size in zip(ranks, sizes) if self._is_elsewhere(rank))
            return self._originals[1](output, input, output_split_sizes, input_split_sizes, group=group, **kwargs)

        dist.batch_isend_irecv, dist.all_to_all_single = batch_isend_irecv, all_to_all_single
        return self

    def __exit__(self, *failure):
        dist.batch_isend_irecv, dist.all_to_all_single = self._originals

    def _is_elsewhere(self, rank):
        return rank // self.ranks_per_host != self.host


def inputs(seq_len, kind):
    """The same query, key, value and gradient of the whole sequence on every rank."""
    generator = torch.Generator().manual_seed(7)

    def make(heads):
        return torch.randn(seq_len, 1, heads, DIM, generator=generator).to(kind)

    return make(HEADS), make(KV_HEADS), make(KV_HEADS), make(HEADS)


def dense(query, key, value, grad):
    """Out and gradients by plain attention in float64, whole sequence."""
    leaves = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def step(config, groups, layout, whole):
    """Forward and backward of this rank's shard; returns [out, dq, dk, dv]."""
    shards = [layout.shard(tensor, groups.cp_rank) for tensor in whole]
    leaves = [shard.clone().requires_grad_() for shard in shards[:3]]
    out = context_parallel_attention(*leaves, config=config, groups=groups, layout=layout)
    out.backward(shards[3])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def be_rank(args):
    """One of the four ranks."""
    torch.set_num_threads(1)
    # The ranks meet here when the slowest has imported torch, which is not a matter of silent peers.
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = inputs(args.seq_length, torch.float32)
    wanted = dense(*whole)
    dist.barrier()  # from here on nobody is late
    for name in args.algorithm:
        config = ContextParallelConfig(context_parallel_size=world, **CONFIGS[name])
        groups = ContextParallelGroups.build(config, timeout=timedelta(seconds=args.timeout))
        layout = SequenceLayout.build(config, args.seq_length)
        line = {"rank": rank, "algorithm": name, **measure(config, groups, layout, whole, wanted)}
        sys.stdout.write(json.dumps(line) + "\n")  # one write, so that lines of several ranks never mix
        sys.stdout.flush()
    for count in range(10**6 if args.cut_after else 0):
        step(config, groups, layout, whole)
        if rank == 0 and count == 0:
            print(RUNNING, flush=True)
    dist.destroy_process_group()


def measure(config, groups, layout, whole, wanted):
    """What one step sends and the largest error of its results."""
    step(config, groups, layout, whole)  # connections are made by the first step
    dist.barrier()
    before = int(COUNTER.read_text(encoding="ascii"))
    with count_bytes() as traffic, HostMeter(int(os.environ["LOCAL_WORLD_SIZE"])) as meter:
        results = step(config, groups, layout, whole)
    dist.barrier()
    after = int(COUNTER.read_text(encoding="ascii"))
    shards = [layout.shard(tensor, groups.cp_rank) for tensor in wanted]
    error = max(float((got - want).abs().max()) for got, want in zip(results, shards))
    return {
        "counted": dict(traffic.bytes), "to_other_host": meter.bytes, "error": error, "device_bytes": after - before,
    }  # fmt: skip
