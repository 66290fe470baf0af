"""Predicted and measured time of one attention layer for every setting: the planner's ranking, checked without devices.

    python tests/check plan [--rates 4gbit 400mbit 50mbit] [--mesh-rates 200mbit 50mbit]

Two network namespaces are two hosts with two ranks each and a link of the rate for each rank, then four are a full mesh
(needs root; else status 77). All ranks measure the kernel at once, because they share the cores, then the link within
their host; the rate between hosts is the one that was set. Every setting runs forward and backward, all of them in
turns; rank 0 prints the medians beside what the planner predicts. The exit status is 1 where the predicted fastest
setting takes over 10 % longer than the measured fastest one. With --latent multi-latent attention is run, by latents
and by heads, the up-projection of keys and values included in both columns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from bench.measuring import head, in_turns, row
from figures.network import REFUSED, Network, bits_per_second, mesh, two_hosts
from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, LatentExpansion, SequenceLayout, TrainingSetup
from mindspeed_cp import context_parallel_attention
from mindspeed_cp.comm.link import link_of
from mindspeed_cp.doctor.self_test import rates
from mindspeed_cp.planner.calibrate import kernel_rate
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.search import search
from mindspeed_cp.planner.timing import Candidate
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.rules import tokens

HEADS, KV_HEADS, DIM = 8, 4, 64
NOPE, ROPE, RANK = 48, 16, 128  # of multi-latent attention, whose values are as wide as its keys
CLOSE, PORT = 1.10, 29532


def mean_over_ranks(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def measured_cluster(rate: str, is_mesh: bool) -> Cluster:
    if is_mesh:  # every rank is alone on its host, and reaches each of the others by a link of its own
        world, one = dist.get_world_size(), bits_per_second(rate) / 8
        dist.barrier()
        flops = mean_over_ranks(kernel_rate("cpu"))
        return Cluster(world, flops, one, one, 2e-4, 1.0, 1.0, attention_efficiency=1.0, links=world - 1)
    rank, host = dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = [dist.new_group(list(range(first, first + host))) for first in range(0, dist.get_world_size(), host)]
    dist.barrier()
    flops = mean_over_ranks(kernel_rate("cpu"))
    within = mean_over_ranks(rates(link_of(hosts[rank // host]), "cpu")["ring"])
    return Cluster(host, flops, within, bits_per_second(rate) / 8, 2e-4, 1.0, 1.0, attention_efficiency=1.0)


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


def candidates(args: argparse.Namespace, world: int, cluster: Cluster) -> tuple[tuple[Candidate, ...], float]:
    """(the settings that are run, seconds of what the planner counts with the layer's other products)."""
    kv_heads = HEADS if args.latent else KV_HEADS
    latent = (ROPE, RANK) if args.latent else None
    problem = Problem(args.seq_length, HEADS, kv_heads, DIM, DIM, dtype=torch.float32, latent=latent)
    setup = TrainingSetup(num_attention_heads=HEADS, num_query_groups=kv_heads, seq_length=args.seq_length)
    found = search(world, problem, setup, cluster, policies=(None,)).candidates
    wanted, local = tuple(args.only or [""]), args.seq_length // world
    products = 3 * 2 * RANK * HEADS * (NOPE + DIM) * local if args.latent else 0
    own = cluster.product_seconds(products, local, RANK)
    return tuple(each for each in found if each.config.describe().startswith(wanted)), own


def be_rank(args: argparse.Namespace, rate: str, is_mesh: bool) -> int:
    """One of the four ranks; the status of all."""
    if not is_mesh:  # a link for each rank of a host
        os.environ["GLOO_SOCKET_IFNAME"] = f"eth{os.environ['LOCAL_RANK']}"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    world, cluster = dist.get_world_size(), measured_cluster(rate, is_mesh)
    found, own = candidates(args, world, cluster)
    calls = [call_of(candidate.config, args.seq_length, args.latent) for candidate in found]

    def seconds(call: Callable[[], None]) -> float:
        dist.barrier()
        start = time.perf_counter()
        call()
        dist.barrier()
        return time.perf_counter() - start

    times = in_turns({number: partial(seconds, call) for number, call in enumerate(calls)}, args.repetitions)
    medians = [statistics.median(values) for values in times.values()]
    ratio = torch.tensor(medians[0] / min(medians))
    if dist.get_rank() == 0:
        within = cluster.intra_bandwidth / 1e9
        print(f"kernel {cluster.flops / 1e9:.1f} GFLOP/s for each rank, {within:.2f} GB/s within a host\n")
        head("setting", "predicted ms:", "measured ms:")
        for candidate, median in zip(found, medians):
            row(candidate.config.describe(), f"{(candidate.seconds + own) * 1e3:.0f}", f"{median * 1e3:.0f}")
        print(f"\nthe predicted fastest takes {ratio:.2f} x the measured fastest")
    dist.broadcast(ratio, 0)
    dist.destroy_process_group()
    return int(ratio > CLOSE)


def run(network: Network, ranks: int, rate: str) -> int:
    """The status of the ranks, so many on each host; what rank 0 prints is shown."""
    words = [sys.executable, *sys.orig_argv[1:], "--rank-of", rate, *(["--in-mesh"] if ranks == 1 else [])]
    hosts = [
        network.start(host, ranks, words, PORT, stdout=None if host == 0 else subprocess.DEVNULL)
        for host in range(len(network.hosts))
    ]
    return max(host.wait() for host in hosts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="*", default=["4gbit", "400mbit", "50mbit"], help="between two hosts")
    parser.add_argument("--mesh-rates", nargs="*", default=["200mbit", "50mbit"], help="of the links of a full mesh")
    parser.add_argument("--seq-length", type=tokens, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--latent", action="store_true", help="multi-latent attention, by latents and by heads")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="beginnings of the settings that are run")
    parser.add_argument("--rank-of", metavar="RATE", help=argparse.SUPPRESS)
    parser.add_argument("--in-mesh", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return be_rank(args, args.rank_of, args.in_mesh)
    status = 0
    try:
        for rate in args.rates:
            print(f"== {rate} between the hosts for each rank", flush=True)
            with two_hosts(2, rate) as network:
                status |= run(network, 2, rate)
        for rate in args.mesh_rates:
            print(f"== {rate} between any two of four ranks", flush=True)
            with mesh(4, rate) as network:
                status |= run(network, 1, rate)
    except PermissionError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return status


if __name__ == "__main__":
    sys.exit(main())
