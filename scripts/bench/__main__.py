"""The benchmarks: one program, whose first argument names the benchmark.

    python scripts/bench attention --ranks 2        --help lists the flags of each benchmark

Machines are shared and noisy: variants are interleaved within one run, and medians are printed. OMP_NUM_THREADS=1 is
the default, so that ranks do not compete for cores. tests/figures contains those for figures of the documentation.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from program import run

BENCHMARKS = {
    "bench.attention": "every algorithm over the ideal, or with --stub its communication, merging and copying alone",
    "bench.kernels": "a kernel in the blocks of a ring rank over the whole sequence in one call, on any device",
    "figures.documents": "packed documents: the zigzag of the whole row beside the balanced layout",
    "figures.mesh": "the exchanges on an emulated full mesh: mesh N RATE",
    "figures.packing": "documents on any number of ranks: one row over all beside groups for each length",
    "figures.parts": "planning the blocks of a new batch; half precision on a CPU",
    "figures.recompute": "a model under full recomputation, with and without its attention kept",
}

if __name__ == "__main__":
    sys.exit(run("scripts/bench", BENCHMARKS))
