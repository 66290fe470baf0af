"""Time the exchanges on an emulated full mesh: every pair of ranks has a link of its own, with a rate of its own.

``python scripts/bench mesh 4 20mbit``     as root, or with the right to make network namespaces; else status 77

Each rank is alone on its host; gloo, kernels stubbed: communication alone counts. Prints for each exchange the time of
a forward pass, and of forward and backward, over the floor: its own bytes, if all links carried all the time. "With a
kernel" is one that takes as long as the exchange. Rates at which two cores keep up: 20mbit for 4 ranks, 10mbit for 8.
"""

import argparse
import sys
import tempfile

from figures.network import REFUSED, Network, bits_per_second, mesh, mesh_device

PORT = 29777


def on_all_hosts(network: Network, command: list[str]) -> str:
    """What rank 0 prints of ``command``, run as a rank on each host.

    Raises:
        RuntimeError: a rank failed; the message is what it said.
    """
    files = [tempfile.TemporaryFile("w+") for _ in network.hosts]
    processes = [network.start(host, 1, command, PORT, stdout=file, stderr=file) for host, file in enumerate(files)]
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


def sent_by_link(network: Network) -> list[list[int]]:
    """Bytes that left each rank's end of its link to each other, headers included."""
    every = range(len(network.hosts))
    return [[network.sent(me, mesh_device(me, peer)) if me != peer else 0 for peer in every] for me in every]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, help="default 512 a rank")
    parser.add_argument("--kv-heads", type=int, default=32, help="default: as many as query heads, 32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("ranks", type=int, metavar="N")
    parser.add_argument("rate", metavar="RATE", help="of a link, such as 20mbit, or none")
    parser.add_argument("--only", default="", help="names of rows, with semicolons between them")
    parser.add_argument("--count", action="store_true", help="print what every link carried, as rows of JSON")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seq_length = options.seq_length or 512 * options.ranks
    options.bits = None if options.rate == "none" else bits_per_second(options.rate)
    if options.in_namespace:  # this process, which starts the ranks, needs no torch
        from figures.mesh_rank import measure

        measure(options)
        return 0
    try:
        with mesh(options.ranks, options.rate if options.bits else None) as network:
            before = sent_by_link(network)
            print(on_all_hosts(network, [sys.executable, *sys.orig_argv[1:], "--in-namespace"]), end="", flush=True)
            if options.count:
                print([[b - a for a, b in zip(*rows)] for rows in zip(before, sent_by_link(network))])
    except PermissionError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0
