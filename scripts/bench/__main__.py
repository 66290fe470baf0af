"""The benchmarks: one program, whose first argument names what is measured.

    python scripts/bench attention --ranks 2        every benchmark says with --help what it takes

Machines are shared and noisy: variants are measured in turns within one run, and medians are printed. OMP_NUM_THREADS=1
is the default, so that ranks do not compete for cores.
"""

import importlib
import os
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
BENCHMARKS = {
    "attention": "every algorithm over the ideal, or with --stub its communication, merging and copying alone",
    "documents": "packed documents: the zigzag of the whole row beside the balanced layout",
    "kernels": "a kernel in the blocks of a ring rank over the whole sequence in one call, on any device",
    "mesh": "the exchanges on an emulated full mesh: mesh N RATE",
    "packing": "documents on any number of ranks: one row over all beside groups for each length",
    "parts": "planning the blocks of a new batch; half precision on a CPU",
    "recompute": "a model under full recomputation, with and without its attention kept",
}


def main() -> object:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        listed = "\n".join(f"  {name:10} {what}" for name, what in BENCHMARKS.items())
        print(f"usage: python scripts/bench NAME [arguments]\n\n{listed}", file=sys.stderr)
        return 2
    if sys.argv[1] != "kernels":  # which times a device
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:1] = [str(SCRIPTS.parent), str(SCRIPTS)]  # the first was this folder
    name = sys.argv[1]
    sys.argv = [f"scripts/bench {name}", *sys.argv[2:]]
    return importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    sys.exit(main())
