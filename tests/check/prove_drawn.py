"""Prove drawn command lines of the embedded trainer: on sound code none may differ.

    python tests/check prove_drawn --cases 200 --seed 1 [--verbose]

    equal      outputs, gradients, losses are those without context parallelism
    refused    the trainer, or the proof, refuses the command line; it does not count as a case
    different  a false alarm, or a fault; the command line and the report are printed

Exit status 1 if anything differs. The drawing is fuzz.py's; one seed draws one sequence of command lines.
"""

import trainer.quiet  # noqa: F401  before Megatron warns
import mindspeed_cp.megatron_adaptor  # noqa: F401  before anything of Megatron

import argparse
import random
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

from drawing import draw

from mindspeed_cp.prove import command, report, shrinking
from mindspeed_cp.prove.launching import Server
from mindspeed_cp.prove.shrinking import Wish

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py")
KINDS = ("equal", "refused", "different")
RANKS = 4


def proved(flags: list[str], seed: int, limit: float, server: Server) -> tuple[str, str]:
    """(kind, report) of one command line."""
    with tempfile.TemporaryDirectory(prefix="prove-drawn-") as folder:
        wish = Wish(ranks=RANKS, steps=2, seed=seed, limit=limit)
        try:
            plan = shrinking.plan(SCRIPT, flags, wish, Path(folder))
        except ValueError as error:
            return "refused", str(error)
        verdict = command.proved(plan, server)
    if verdict.comparison is None and "error: " in verdict.failure:
        return "refused", verdict.failure
    return ("equal" if verdict.equal else "different"), report.text(verdict)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20, help="command lines that are proved (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the drawing (default: 1)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a run (default: 300)")
    parser.add_argument("--verbose", action="store_true", help="print every command line with its kind")
    args = parser.parse_args(argv)
    from prepare_data import main as prepare_data

    rng, counts = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory(prefix="prove-drawn-") as folder, Server(Path(folder)) as server:
        prefix = str(Path(folder) / "paragraphs")
        prepare_data(["--output", prefix, "--documents", "paragraphs"])
        while counts["equal"] + counts["different"] < args.cases:
            line = draw(rng)
            if dict(line.settings).get("--context-parallel-size") in (None, "1"):
                continue
            kind, said = proved([*line.flags(), "--data-path", prefix], args.seed, args.limit, server)
            counts[kind] += 1
            if kind == "different" or args.verbose:
                why = f"    {said.splitlines()[-1]}" if kind == "refused" else ""
                print(f"{kind}: {shlex.join(line.flags())}", why, sep="\n" if why else "", flush=True)
            if kind == "different":
                print("    " + "\n    ".join(said.splitlines()), flush=True)
    print("| seed | command lines | " + " | ".join(KINDS) + " |")
    print("|---" * (len(KINDS) + 2) + "|")
    print(f"| {args.seed} | {sum(counts.values())} | " + " | ".join(str(counts[kind]) for kind in KINDS) + " |")
    return 1 if counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
