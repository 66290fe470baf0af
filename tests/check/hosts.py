"""One attention layer over two hosts with two ranks each: what leaves a host is what is counted, and results are right.

    python tests/check hosts hybrid double_ring       hosts are network namespaces (needs root); else status 77
    --cut-after SECONDS      then repeat the last one and take the link down that long after its first step; both sides
                             must end with an error

For each algorithm every rank prints one line of JSON: rank, bytes counted by purpose, bytes to ranks of the other host,
largest error against dense attention, bytes by the counter of the host's device.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from figures.network import REFUSED, Network, two_hosts

ALGORITHMS = ("hybrid", "double_ring")
RUNNING, PORT = "running", 29531  # the first rank says the word after the first step that is repeated


def run(network: Network, args: argparse.Namespace, folder: Path) -> int:
    """Start both hosts, show what they say, and return 1 if one of them failed."""
    command = [sys.executable, *sys.orig_argv[1:], "--in-namespace"]
    outputs = [(open(folder / f"{host}.out", "w"), open(folder / f"{host}.err", "w")) for host in "ab"]
    hosts = [network.start(host, 2, command, PORT, stdout=out, stderr=err) for host, (out, err) in enumerate(outputs)]
    try:
        if args.cut_after:
            while RUNNING not in (folder / "a.out").read_text() and hosts[0].poll() is None:
                time.sleep(0.1)
            time.sleep(args.cut_after)
            network.cut()
            print("link cut")
        statuses = [host.wait() for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        for host in "ab":
            stream.writelines(f"{host}: {line}\n" for line in (folder / f"{host}.{kind}").read_text().splitlines())
    print(f"exit status: {statuses[0]} on the first host, {statuses[1]} on the second")
    return int(any(statuses))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", nargs="+", choices=ALGORITHMS)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds after which a silent peer is given up")
    parser.add_argument(
        "--cut-after", type=float, help="seconds after the first repeated step at which the link is cut"
    )
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_namespace:  # this process, which starts the ranks, needs no torch
        from hosts_rank import be_rank

        be_rank(args)
        return 0
    try:
        with two_hosts() as network, tempfile.TemporaryDirectory(prefix="hosts-") as folder:
            return run(network, args, Path(folder))
    except PermissionError as error:
        print(error, file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
