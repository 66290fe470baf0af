"""Draw command lines for the embedded trainer, run them in forked ranks, and say how each ended.

    python tests/check fuzz --seconds 120 --seed 1 [--verbose]

    equal     it trained to the losses of the same command line without context parallelism, up to the step at which a
              learning rate of nonsense has doubled the loss: from there on rounding grows without bound
    refused   exit status 2, one line with the flag, before any process group
    wrong     it trained to other losses
    crash     a traceback, a signal, or more than one line
    hang      it did not end within --limit seconds
    no pair   it trained, and without context parallelism its model is refused; or its gradients stop being numbers, and
              do so without context parallelism too

Exit status 1 if anything is wrong, a crash or a hang; those command lines are printed. One seed draws one sequence of
them.
"""

import trainer.quiet  # noqa: F401  before Megatron warns
import mindspeed_cp.megatron_adaptor  # noqa: F401  before anything of Megatron

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import forked
from drawing import CommandLine, draw

NO_NUMBER = "found NaN in local grad norm"  # Megatron's own words, at a learning rate of nonsense
KINDS = ("equal", "refused", "wrong", "crash", "hang", "no pair")
TOLERANCE, TOLERANCE_BF16 = 1e-4, 2e-2


@dataclass(frozen=True)
class Ending:
    """How the ranks of one command line ended: trained, refused, crash or hang; losses by step; what was said."""

    kind: str
    losses: tuple[float, ...] = ()
    said: str = ""


def launch(flags: list[str], world_size: int, folder: Path, limit: float) -> Ending:
    """Run the trainer with ``flags`` on ``world_size`` ranks forked from this process."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    log = folder / "run.jsonl"
    ranks = forked.start(
        world_size,
        lambda rank: (folder / f"{rank}.out", folder / f"{rank}.err"),
        lambda rank: train([*flags, "--log-file", str(log)], rank),
    )
    # When rank 0 refuses, the others wait to say the same, and count as if they had.
    statuses = forked.finish(ranks, limit, lambda rank, status: 0.0 if (rank, status) == (0, 2) else limit)
    if statuses.get(0) == 2:
        statuses |= {rank: 2 for rank in range(world_size) if rank not in statuses}
    errors = [folder / f"{rank}.err" for rank in range(world_size)]
    # A rank that was ended because rank 0 had refused may not have opened its file.
    said = "".join(path.read_text(encoding="utf-8", errors="replace") for path in errors if path.is_file())
    if len(statuses) < world_size:
        return Ending("hang", said=said)
    if set(statuses.values()) == {0}:
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return Ending("trained", tuple(record["loss"] for record in records if "loss" in record), said)
    if set(statuses.values()) == {2} and said.count("\n") == 1 and "pretrain_gpt.py: error: " in said:
        return Ending("refused", said=said)
    return Ending("crash", said=f"{said}\nexit statuses {sorted(statuses.values())}")


def train(flags: list[str], rank: int) -> None:
    """The life of a rank."""
    import trainer.rules
    from pretrain_gpt import main

    trainer.rules.GRACE = 0.0 if rank == 0 else 60.0  # rank 0 says what all would say; the others are ended
    main(flags)


def classify(line: CommandLine, prefix: str, folder: Path, limit: float, references: dict) -> tuple[str, str]:
    """(kind, what was said) of one command line."""
    ending = launch([*line.flags(), "--data-path", prefix], line.world_size, folder / "drawn", limit)
    if ending.kind != "trained" and NO_NUMBER not in ending.said:
        return ending.kind, ending.said
    plain = line.without_context_parallelism()
    key = (tuple(plain.flags()), plain.world_size)
    if key not in references:
        references[key] = launch([*plain.flags(), "--data-path", prefix], plain.world_size, folder / "plain", limit)
    reference = references[key]
    if reference.kind == "refused" or (NO_NUMBER in ending.said and NO_NUMBER in reference.said):
        return "no pair", reference.said
    if ending.kind != "trained":
        return ending.kind, ending.said
    if reference.kind != "trained":
        return reference.kind, f"without context parallelism: {reference.said}"
    tolerance = TOLERANCE_BF16 if "--bf16" in line.flags() else TOLERANCE
    exploded = next(
        (step for step, loss in enumerate(reference.losses) if loss >= 2 * reference.losses[0]), len(reference.losses)
    )
    differences = [abs(a - b) / abs(b) for a, b in zip(ending.losses[: exploded + 1], reference.losses)]
    same = len(ending.losses) == len(reference.losses) and all(value <= tolerance for value in differences)
    return ("equal" if same else "wrong"), f"{ending.losses} against {reference.losses}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to draw (default: 120)")
    parser.add_argument("--cases", type=int, help="stop after so many command lines")
    parser.add_argument("--seed", type=int, default=1, help="of the drawing (default: 1)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a run hangs (default: 90)")
    parser.add_argument("--verbose", action="store_true", help="print every command line with its kind")
    args = parser.parse_args(argv)
    from prepare_data import main as prepare_data

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    prefix = str(folder / "paragraphs")
    prepare_data(["--output", prefix, "--documents", "paragraphs"])
    rng, counts, references, end = random.Random(args.seed), Counter(), {}, time.monotonic() + args.seconds
    try:
        while time.monotonic() < end and sum(counts.values()) < (args.cases or sys.maxsize):
            line = draw(rng)
            kind, said = classify(line, prefix, folder, args.limit, references)
            counts[kind] += 1
            if kind in ("wrong", "crash", "hang") or args.verbose:
                print(f"{kind}: {line.world_size} ranks: {shlex.join(line.flags())}", flush=True)
                print("    " + "\n    ".join(said.strip().splitlines()[-12:]), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("| seed | command lines | " + " | ".join(KINDS) + " |")
    print("|---" * (len(KINDS) + 2) + "|")
    print(f"| {args.seed} | {sum(counts.values())} | " + " | ".join(str(counts[kind]) for kind in KINDS) + " |")
    return 1 if counts["wrong"] or counts["crash"] or counts["hang"] else 0


if __name__ == "__main__":
    sys.exit(main())
