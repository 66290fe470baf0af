"""Time the exchanges on an emulated full mesh: every pair of ranks has a link of its own, with a rate of its own.

``python scripts/bench_mesh.py 4 20mbit``     as root, or with the right to make network namespaces; else status 77

One namespace for each rank, a veth pair and a rate limit for each ordered pair, gloo, kernels stubbed: communication
alone counts. Prints for each exchange the time of a forward pass, and of forward and backward, over the floor: its own
bytes, if all links carried all the time. "With a kernel" is one that takes as long as the exchange. Rates at which two
cores keep up: 20mbit for 4 ranks, 10mbit for 8.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFUSED = 77  # the status that means "cannot be tried here"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
HEADS, HEAD_DIM = 32, 16


def bits_per_second(rate: str) -> float:
    """ "20mbit" -> 2e7."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if found is None:
        raise ValueError(f"RATE {rate} must be a number with kbit, mbit or gbit; try 20mbit.")
    return float(found[1]) * UNITS[found[2]]


# The machine: namespaces and links.


def call(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def device(rank: int, peer: int) -> str:
    return f"v{rank}-{peer}"


@contextmanager
def mesh(ranks: int, rate: str | None) -> Iterator[list[str]]:
    """Names of the namespaces, one for each rank; all is gone afterwards.

    Raises:
        PermissionError: this machine does not let us.
    """
    names = [f"mesh{os.getpid()}-{rank}" for rank in range(ranks)]
    try:
        try:
            for rank, name in enumerate(names):
                make_host(name, rank)
            for rank in range(ranks):
                for peer in range(rank + 1, ranks):
                    make_link(names, rank, peer, rate)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            raise PermissionError(said.decode(errors="replace").strip()) from error
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def make_host(name: str, rank: int) -> None:
    """A namespace whose address lies on a device that is no link."""
    call("ip", "netns", "add", name)
    call("ip", "-n", name, "link", "set", "lo", "up")
    try:
        call("ip", "-n", name, "link", "add", "d0", "type", "dummy")
    except subprocess.CalledProcessError:  # a kernel without dummies
        call("ip", "-n", name, "link", "add", "d0", "type", "bridge")
    call("ip", "-n", name, "addr", "add", f"10.99.0.{rank + 1}/32", "dev", "d0")
    call("ip", "-n", name, "link", "set", "d0", "up")
    for setting in (
        "tcp_slow_start_after_idle=0",
        "conf.all.rp_filter=0",
        "tcp_rmem=4096 4194304 8388608",
        "tcp_wmem=4096 4194304 8388608",
    ):
        subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.{setting}"], check=False)


def make_link(names: list[str], rank: int, peer: int, rate: str | None) -> None:
    """A veth pair with a route and a rate in each direction. Acknowledgements are not held up behind data."""
    number = rank * len(names) + peer
    ends = ((rank, peer, 1), (peer, rank, 2))
    call(
        *("ip", "link", "add", device(rank, peer), "netns", names[rank], "type", "veth"),
        *("peer", "name", device(peer, rank), "netns", names[peer]),
    )
    for mine, other, place in ends:
        call("ip", "-n", names[mine], "addr", "add", f"10.98.{number}.{place}/30", "dev", device(mine, other))
        call("ip", "-n", names[mine], "link", "set", device(mine, other), "up")
    for mine, other, place in ends:
        call(
            *("ip", "-n", names[mine], "route", "add", f"10.99.0.{other + 1}/32", "via", f"10.98.{number}.{3 - place}"),
            *("dev", device(mine, other), "src", f"10.99.0.{mine + 1}", "initcwnd", 3000, "initrwnd", 3000),
            *("congctl", "reno"),
        )
        if rate is not None:
            limit(names[mine], device(mine, other), rate)


def limit(name: str, link: str, rate: str) -> None:
    call("tc", "-n", name, "qdisc", "add", "dev", link, "root", "handle", "1:", "htb", "default", 10)
    for number, of_class in ((10, (rate, "quantum", 3000, "burst", "64kb")), (20, ("10gbit", "quantum", 3000))):
        call(
            "tc",
            "-n",
            name,
            "class",
            "add",
            "dev",
            link,
            "parent",
            "1:",
            "classid",
            f"1:{number}",
            "htb",
            "rate",
            *of_class,
        )
    small = ("match", "u16", "0x0000", "0xff80", "at", 2)  # packets of less than 128 bytes
    call(
        "tc",
        "-n",
        name,
        "filter",
        "add",
        "dev",
        link,
        "parent",
        "1:",
        "protocol",
        "ip",
        "u32",
        *small,
        "flowid",
        "1:20",
    )


def on_all_ranks(names: list[str], words: list[str]) -> str:
    """What rank 0 prints of this program, run as a rank in each namespace.

    Raises:
        RuntimeError: a rank failed; the message is what it said.
    """
    files = [tempfile.TemporaryFile("w+") for _ in names]
    processes = []
    for rank, (name, file) in enumerate(zip(names, files)):
        variables = dict(GLOO_SOCKET_IFNAME="d0", MASTER_ADDR="10.99.0.1", MASTER_PORT=29777, OMP_NUM_THREADS=1)
        variables |= dict(
            RANK=rank, WORLD_SIZE=len(names), PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
        command = ["ip", "netns", "exec", name, sys.executable, __file__, *words, "--in-namespace"]
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = []
    for file in files:
        file.seek(0)
        printed.append(file.read())
    if any(codes):
        raise RuntimeError(next(text for code, text in zip(codes, printed) if code))
    return printed[0]


# A rank.


def variants(ranks: int) -> dict[str, dict]:
    ring = {"algorithm": "megatron_cp_algo", "send_recv_overlap": True}
    direct, mesh_exchange = ({**ring, "kv_exchange": exchange} for exchange in ("direct", "mesh"))
    full = {"attention_mask_type": "full"}
    table = {
        "ring": ring,
        "kv all-gather": {"algorithm": "kvallgather_cp_algo", "send_recv_overlap": True},
        "direct": direct,
        "direct, all in flight": {**direct, "in_flight": ranks - 1},
        "mesh": mesh_exchange,
        "mesh, 2 in flight": {**mesh_exchange, "in_flight": 2},
        "ring, full mask": {**ring, **full},
        "mesh, full mask": {**mesh_exchange, **full},
    }
    if HEADS % ranks == 0:
        table["ulysses"] = {"algorithm": "ulysses_cp_algo"}
        table["ulysses with a kernel"] = {"algorithm": "ulysses_cp_algo"}
        for chunks in (2, 4, 8):
            if chunks <= HEADS // ranks:
                settings = {"algorithm": "ulysses_cp_algo", "ulysses_chunks": chunks}
                table[f"ulysses with a kernel, {chunks} chunks"] = settings
    return table


def measure(options: argparse.Namespace) -> None:
    """One rank of the benchmark."""
    import torch
    import torch.distributed as dist

    from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention
    from mindspeed_cp.comm import count_bytes
    from mindspeed_cp.kernels.base import AttentionKernel, BlockResult

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    class Kernel(AttentionKernel):
        """Zeros of the right shapes, after as much time as was asked for the whole of a pass."""

        name, native_bands = "stub", True

        def __init__(self, seconds=0.0):
            self.seconds = seconds

        def forward(self, tensors, options):
            query = tensors.query
            time.sleep(self.seconds * query.shape[2] * ranks / HEADS)
            out = torch.zeros((*query.shape[:3], tensors.value.shape[3]), dtype=query.dtype)
            return BlockResult(out, torch.zeros(query.shape[:3], dtype=torch.float32))

        def backward(self, tensors, rows, options, saved):
            time.sleep(self.seconds * tensors.query.shape[2] * ranks / HEADS)
            return tuple(torch.zeros_like(like) for like in (tensors.query, tensors.key, tensors.value))

    local = options.seq_length // ranks
    leaves = [
        torch.randn(local, 1, heads, HEAD_DIM, dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, options.kv_heads, options.kv_heads)
    ]
    # Four tensors of a rank's heads in all, of which each link carries one share.
    exchange = (
        4 * local * HEADS / ranks * HEAD_DIM * 16 / bits_per_second(options.rate) if options.rate != "none" else 0
    )
    calls = {}
    for name, settings in variants(ranks).items():
        if options.only and name not in options.only.split(";"):
            continue
        config = ContextParallelConfig(context_parallel_size=ranks, **settings)
        keywords = dict(
            config=config,
            groups=ContextParallelGroups.build(config, share_from=None),
            layout=SequenceLayout.build(config, local * ranks),
            kernel=Kernel(exchange if "kernel" in name else 0.0),
        )
        calls[name] = keywords
    times = {name: [] for name in calls}
    sent = {}
    for repetition in range(options.repetitions + 1):
        for name, keywords in calls.items():
            dist.barrier()
            start = time.perf_counter()
            with count_bytes() as traffic:
                out = context_parallel_attention(*leaves, **keywords)
                forward = time.perf_counter() - start
                out.backward(out)
            taken = torch.tensor([forward, time.perf_counter() - start])
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            total = torch.tensor(float(traffic.total_bytes), dtype=torch.float64)
            dist.all_reduce(total)
            sent[name] = total.item()
            if repetition:
                times[name].append(taken.tolist())
    if rank == 0:
        report(times, sent, ranks, options)
    dist.destroy_process_group()


def report(times, sent, ranks, options) -> None:
    print(
        f"{ranks} ranks, {ranks - 1} links each of {options.rate}, S={options.seq_length}, bf16, {HEADS} heads, "
        f"{options.kv_heads} KV heads, kernels stubbed; median of {options.repetitions}"
    )
    print(
        "| exchange | forward ms | forward + backward ms | MiB a rank | over the floor of its bytes | over the ring |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    ring = statistics.median(both for _, both in times["ring"]) if "ring" in times else None
    for name, taken in times.items():
        forward, both = (statistics.median(values) for values in zip(*taken))
        floor = (
            sent[name] * 8 / (ranks * (ranks - 1)) / bits_per_second(options.rate) if options.rate != "none" else None
        )
        columns = (
            f"{1e3 * forward:.0f}",
            f"{1e3 * both:.0f}",
            f"{sent[name] / ranks / 2**20:.2f}",
            f"{both / floor:.2f}" if floor else "",
            f"{both / ring:.2f}" if ring else "",
        )
        print(f"| {name} | {' | '.join(columns)} |")


def sent_by_link(names: list[str]) -> list[list[int]]:
    """Bytes that left each rank's end of its link to each other, headers included."""

    def read(rank: int, peer: int) -> int:
        path = f"/sys/class/net/{device(rank, peer)}/statistics/tx_bytes"
        # A namespace's own devices show in a sysfs that is mounted inside it.
        return int(subprocess.check_output(["ip", "netns", "exec", names[rank], "cat", path]))

    return [[read(rank, peer) if rank != peer else 0 for peer in range(len(names))] for rank in range(len(names))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=int, metavar="N")
    parser.add_argument("rate", metavar="RATE", help="of a link, such as 20mbit, or none")
    parser.add_argument("--seq-length", type=int, default=None, help="default 512 a rank")
    parser.add_argument("--kv-heads", type=int, default=HEADS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="", help="names of rows, with semicolons between them")
    parser.add_argument("--count", action="store_true", help="print what every link carried, as rows of JSON")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seq_length = options.seq_length or 512 * options.ranks
    if options.rate != "none":
        bits_per_second(options.rate)
    if options.in_namespace:
        measure(options)
        return 0
    try:
        with mesh(options.ranks, None if options.rate == "none" else options.rate) as names:
            before = sent_by_link(names)
            print(on_all_ranks(names, sys.argv[1:]), end="", flush=True)
            if options.count:
                after = sent_by_link(names)
                print([[b - a for a, b in zip(*rows)] for rows in zip(before, after)])
    except PermissionError as error:
        print(f"no network namespaces here: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
