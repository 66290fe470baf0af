"""Predicted and measured time of one attention layer for every setting, on the ranks of scripts/check_plan.sh: those of
two hosts, or of a full mesh.

All ranks measure the kernel at once, because they share the cores, then the link within their host; the rate between
hosts is the one that was set. Every setting runs forward and backward, all of them in turns; rank 0 prints the medians
beside what the planner predicts, and exits with 1 when its choice is over 10 % slower than the fastest. With --latent
multi-latent attention is run, by latents and by heads, the up-projection of keys and values included in both columns.
"""

import argparse
import os
import statistics
import sys
import time
from datetime import timedelta

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, LatentExpansion, SequenceLayout, TrainingSetup
from mindspeed_cp import context_parallel_attention
from mindspeed_cp.comm.link import link_of
from mindspeed_cp.doctor.self_test import rates
from mindspeed_cp.planner.calibrate import kernel_rate
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.search import search
from mindspeed_cp.planner.trace import Problem

HEADS, KV_HEADS, DIM = 8, 4, 64
NOPE, ROPE, RANK = 48, 16, 128  # of multi-latent attention, whose values are as wide as its keys
UNITS = {"gbit": 1e9 / 8, "mbit": 1e6 / 8, "kbit": 1e3 / 8}
CLOSE = 1.10


def bytes_per_second(rate: str) -> float:
    return float(rate[:-4]) * UNITS[rate[-4:]]


def mean_over_ranks(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def measured_cluster(rate: str, is_mesh: bool) -> Cluster:
    if is_mesh:  # every rank is alone on its host, and reaches each of the others by a link of its own
        world, one = dist.get_world_size(), bytes_per_second(rate)
        dist.barrier()
        flops = mean_over_ranks(kernel_rate("cpu"))
        return Cluster(world, flops, one, one, 2e-4, 1.0, 1.0, attention_efficiency=1.0, links=world - 1)
    rank, host = dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = [dist.new_group(list(range(first, first + host))) for first in range(0, dist.get_world_size(), host)]
    dist.barrier()
    flops = mean_over_ranks(kernel_rate("cpu"))
    within = mean_over_ranks(rates(link_of(hosts[rank // host]), "cpu")["ring"])
    return Cluster(host, flops, within, bytes_per_second(rate), 2e-4, 1.0, 1.0, attention_efficiency=1.0)


def call_of(config: ContextParallelConfig, seq_len: int, latent: bool):
    """Forward and backward of this rank's part; nobody starts the second before all have ended the first, as the
    planner adds them up.
    """
    groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, seq_len)
    length = layout.length(groups.cp_rank)
    sizes = ((HEADS, DIM), (1, ROPE), (1, RANK)) if latent else ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))
    leaves = [torch.randn(length, 1, *size, requires_grad=True) for size in sizes]
    grad_out = torch.randn(length, 1, HEADS, DIM)
    weight = torch.randn(HEADS * (NOPE + DIM), RANK, requires_grad=True)
    expand = LatentExpansion(weight, HEADS, NOPE, ROPE, DIM) if latent else None

    def call():
        out = context_parallel_attention(*leaves, config=config, groups=groups, layout=layout, expand=expand)
        dist.barrier()
        out.backward(grad_out)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", nargs="+", help="ignored: all of them")
    parser.add_argument("--counter", help="ignored")
    parser.add_argument("--rate", required=True, help="of a link, such as 50mbit")
    parser.add_argument("--mesh", action="store_true", help="the ranks of scripts/mesh.sh")
    parser.add_argument("--latent", action="store_true", help="multi-latent attention, by latents and by heads")
    parser.add_argument("--only", nargs="+", help="beginnings of the settings that are run")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    if os.environ.get("LINKS"):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["LINKS"].split(",")[int(os.environ["LOCAL_RANK"])]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    world, cluster = dist.get_world_size(), measured_cluster(args.rate, args.mesh)
    kv_heads = HEADS if args.latent else KV_HEADS
    latent = (ROPE, RANK) if args.latent else None
    problem = Problem(args.seq_length, HEADS, kv_heads, DIM, DIM, dtype=torch.float32, latent=latent)
    setup = TrainingSetup(num_attention_heads=HEADS, num_query_groups=kv_heads, seq_length=args.seq_length)
    found = search(world, problem, setup, cluster, policies=(None,)).candidates
    found = tuple(each for each in found if each.config.describe().startswith(tuple(args.only or [""])))
    # The planner counts this with the layer's other products.
    products = 2 * RANK * HEADS * (NOPE + DIM) * args.seq_length // world if args.latent else 0
    own = 3 * cluster.product_seconds(products, args.seq_length // world, RANK)
    calls = [call_of(candidate.config, args.seq_length, args.latent) for candidate in found]
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(args.repetitions + 1):
        for call, seconds in zip(calls, times):
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            if repetition:  # the first connects
                seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in times]
    status = 0
    if dist.get_rank() == 0:
        within = cluster.intra_bandwidth / 1e9
        print(f"kernel {cluster.flops / 1e9:.1f} GFLOP/s for each rank, {within:.2f} GB/s within a host\n")
        print("| setting | predicted ms | measured ms |\n| --- | ---: | ---: |")
        for candidate, median in zip(found, medians):
            print(f"| {candidate.config.describe()} | {(candidate.seconds + own) * 1e3:.0f} | {median * 1e3:.0f} |")
        ratio = medians[0] / min(medians)
        print(f"\nthe predicted fastest takes {ratio:.2f} x the measured fastest")
        status = int(ratio > CLOSE)
    dist.barrier()
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
