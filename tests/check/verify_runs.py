"""Training runs of scripts/verify_npu.sh: each feature against the same training without context parallelism.

mindspeed-cp prove compares every output, gradient and step of the embedded trainer, in its real sizes; what a proof
leaves out, such as the distributed optimizer, is trained, and losses and gradient norms are compared. Comparisons with
the same training without context parallelism share its run.

    python tests/check verify_runs algorithms FOLDER --ranks 8     twenty steps a run, the embedded trainer
    python tests/check verify_runs policies|modes|batches|resume FOLDER --ranks 8
    python tests/check verify_runs megatron FOLDER --ranks 8 --checkout DIR    Megatron-LM's own pretrain_gpt.py
    python tests/check verify_runs performance FOLDER --ranks 8 --device npu   a table of the algorithms
    python tests/check verify_runs mindspeed FOLDER --ranks 8 --device npu     one layer by its ring and by this one's
    --quick: Ulysses and Ring alone, five steps, which sizes for a CPU make in any case

The last line says how it ended; exit status 1 when a run fails or its losses differ. A run that fails costs its own
line, and what every rank said of it is printed.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from verify_machine import free_memory
from verify_ranks import TIMEOUT, RunFailed, torchrun
from verify_speed import HEAD, STEPS, Shape, rows, shape_for

from mindspeed_cp.prove import command, report, shrinking
from mindspeed_cp.prove.launching import Server

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOLERANCE = 1e-3  # relative, loss and gradient norm of every step, float32
SMALL = 1 << 30  # bytes of a device below which the trainings take the sizes for a CPU: the test bed's is 32 MiB
TRAINING = (
    "--num-layers 2 --num-attention-heads 16 --global-batch-size 8 --lr 3e-4 "
    "--position-embedding-type rope --use-flash-attn"
)
SIZES = {False: "--hidden-size 256 --seq-length 1024", True: "--hidden-size 64 --seq-length 128"}  # by --tiny
RING, ULYSSES = "--context-parallel-algo megatron_cp_algo", "--context-parallel-algo ulysses_cp_algo"
HYBRID, GATHER = "--context-parallel-algo hybrid_cp_algo", "--context-parallel-algo kvallgather_cp_algo"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
DOCUMENTS = "--reset-attention-mask --reset-position-ids"


@dataclass(frozen=True)
class Run:
    """One comparison: ``flags`` with context parallelism against ``shared`` alone; tp is in both."""

    name: str
    flags: str
    shared: str = ""
    tp: int = 1
    dtype: str = "float32"


RUNS = {
    "alone": (Run("cp=1, --use-flash-attn", "--context-parallel-size 1"),),
    "algorithms": (
        Run("ulysses", ULYSSES),
        Run("ring", f"{RING} --use-cp-send-recv-overlap"),
        Run("ring, direct exchange", f"{RING} --cp-kv-exchange direct"),
        Run("double ring", f"{RING} --cp-window-size 2"),
        Run("hybrid", f"{HYBRID} --ulysses-degree-in-cp 2"),
        Run("kv all-gather", GATHER),
    ),
    "policies": (
        Run("ring, KV cache full", f"{RING} --context-parallel-kv-cache-policy full"),
        Run("ring, KV cache half", f"{RING} --context-parallel-kv-cache-policy half"),
        Run("ulysses, KV cache full", f"{ULYSSES} --context-parallel-kv-cache-policy full"),
        Run("ulysses, KV cache half", f"{ULYSSES} --context-parallel-kv-cache-policy half"),
    ),
    "modes": (
        Run("sequence parallel", RING, "--sequence-parallel", tp=2),
        Run("recompute, kept attention", f"{RING} --cp-keep-attention", RECOMPUTE),
        Run("distributed optimizer and recompute", RING, f"--use-distributed-optimizer {RECOMPUTE}"),
        Run("bf16", RING, dtype="bfloat16"),
    ),
    "batches": (
        Run("packed documents, ring", RING, DOCUMENTS),
        Run("packed documents, ulysses", ULYSSES, DOCUMENTS),
        Run("unaligned", f"{ULYSSES} --gather-size-calculator dynamic", "--seq-length 125"),
    ),
}
QUICK = ("ulysses", "ring")
DATA_PARALLELISM = "data parallelism"


def num_steps(args):
    return 5 if args.quick or (args.tiny and args.what != "resume") else 20


def training_flags(args):
    return [*TRAINING.split(), *SIZES[args.tiny].split(), "--train-iters", str(num_steps(args))]


def train(args, name, flags):
    """Step records of one run of the embedded trainer.

    Raises:
        RunFailed: see ``torchrun``.
    """
    place = args.folder / re.sub(r"\W+", "_", name)
    log = place.with_suffix(".jsonl")
    flags = [*flags, "--data-path", args.folder / "topics", "--log-file", log]
    torchrun(place, args.ranks, [SCRIPTS / "pretrain_gpt.py"], flags)
    return [record for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]


def gap(records, reference):
    """Largest relative difference of loss and gradient norm, step by step."""
    steps = {record["iteration"]: record for record in reference}
    assert records and all(record["iteration"] in steps for record in records)
    return max(
        abs(record[key] - steps[record["iteration"]][key]) / abs(steps[record["iteration"]][key])
        for record in records
        for key in ("loss", "grad_norm")
    )


def compared(name: str, difference: Callable[[], float]) -> float:
    """Print and return a run's difference over what is allowed for it; infinite where the run failed."""
    try:
        found = difference()
    except RunFailed as error:
        print(f"{name}: failed, {error}", flush=True)
        return float("inf")
    print(f"{name}: {found:.1e}", flush=True)
    return found / TOLERANCE


def is_proved(run, what):
    """Whether a proof covers what a run is about: cp=1 is its reference, and the distributed optimizer is left out."""
    return what != "alone" and "--use-distributed-optimizer" not in run.shared


class SharingServer(Server):
    """Runs a training without context parallelism once for all proofs that compare with it."""

    def __init__(self, *place):
        super().__init__(*place)
        self.alone = {}

    def run(self, run, tell):
        if run.name != shrinking.ALONE:
            return super().run(run, tell)
        if run not in self.alone:
            self.alone[run] = super().run(run, tell)
        return self.alone[run]


def proof(args, run, server):
    """Print and return the largest error of a proof over what it allows; infinite where a run failed."""
    script, flags = str(SCRIPTS / "pretrain_gpt.py"), [*training_flags(args), *run.shared.split(), *run.flags.split()]
    flags += ["--tensor-model-parallel-size", str(run.tp), "--data-path", str(args.folder / "topics")]
    given = ["--real-sizes", "--device", args.device, "--dtype", run.dtype, "--steps", str(num_steps(args))]
    given += ["--ranks", str(args.ranks), "--cp", str(args.ranks // run.tp), "--limit", str(TIMEOUT)]
    try:
        wish = command.wish_of(command.parser().parse_args(given))
        found = report.as_json(command.proved(shrinking.plan(script, flags, wish, args.folder), server))
    except ValueError as error:
        found = {"failure": str(error)}
    if found["failure"]:
        print(f"{run.name}: failed, {found['failure']}", flush=True)
        return float("inf")
    errors, first = found["largest_error"], found["first_module"] or found["first_parameter"]
    where = f"; first {first['name']}: {first['signature']}, {first['seen']}" if first else ""
    said = ", ".join(f"{what} {errors[what]:.1e}" for what in found["limits"] if errors.get(what) is not None)
    print(f"{run.name}: {'equal' if found['equal'] else 'DIFFERENT'}, {said}{where}", flush=True)
    shares = (errors[what] / limit for what, limit in found["limits"].items() if errors.get(what) is not None)
    return max(shares) if found["equal"] else float("inf")


def training(args):
    references = {}

    def difference(run):
        shared = [*training_flags(args), *run.shared.split(), "--tensor-model-parallel-size", str(run.tp)]
        if args.what == "alone":
            plain = [flag for flag in shared if flag != "--use-flash-attn"]
            return gap(train(args, run.name, shared), train(args, "without the flag", plain))
        key = run.shared, run.tp
        if key not in references:
            references[key] = train(args, f"without {run.name}", shared)
        flags = [*shared, "--context-parallel-size", str(args.ranks // run.tp), *run.flags.split()]
        return gap(train(args, run.name, flags), references[key])

    with SharingServer(args.folder, args.device) as server:
        return max(
            proof(args, run, server)
            if is_proved(run, args.what)
            else compared(run.name, lambda run=run: difference(run))
            for run in possible(args, args.what)
        )


def possible(args, what):
    """The runs that are asked for, as far as so many ranks can be shared out for them; what is left out is said."""
    for run in RUNS[what]:
        if args.quick and run.name not in QUICK:
            continue
        cp = args.ranks // run.tp
        needs = 4 if "hybrid" in run.name or "double" in run.name else 2
        if what != "alone" and (cp < needs or args.ranks % run.tp):
            print(f"{run.name}: skipped, it needs {needs * run.tp} ranks")
        else:
            yield run


def resume(args):
    """Ten steps with a checkpoint, ten more from it, under context parallelism, then without."""
    flags, save = training_flags(args), str(args.folder / "checkpoint")
    parallel = [*flags, "--context-parallel-size", str(args.ranks), *RING.split()]

    def difference():
        reference = train(args, "without", flags)
        train(args, "first half", [*parallel, "--save", save, "--exit-interval", "10"])
        return max(
            gap(train(args, f"second half {len(more)}", [*more, "--load", save])[-10:], reference)
            for more in (parallel, flags)
        )

    return compared("checkpoint and resume", difference)


def megatron(args):
    """Megatron-LM's own script; it prints loss and gradient norm with six and three digits."""
    from megatron_lm_cases import LENGTH, MOCK, MODEL

    script = args.checkout / "pretrain_gpt.py"
    flags = [*MODEL, *LENGTH.split(), *MOCK, "--train-iters", "5", "--global-batch-size", "8"]
    pattern = re.compile(r"lm loss: (\S+) .*grad norm: (\S+) ")

    def run(name, *more):
        place = args.folder / f"megatron_{name}"
        output = torchrun(place, args.ranks, ["mindspeed_cp.run", script], [*flags, *more], module=True)
        found = [tuple(map(float, pair)) for pair in pattern.findall(output)]
        return [dict(iteration=step, loss=loss, grad_norm=norm) for step, (loss, norm) in enumerate(found)]

    def difference(algorithm):
        name = algorithm.split()[-1]
        alone = run(f"without_{name}")
        return gap(run(name, "--context-parallel-size", str(args.ranks), *algorithm.split()), alone)

    return max(compared(each.split()[-1], lambda each=each: difference(each)) for each in (RING, ULYSSES))


def measured_shape(device, free):
    """What is timed: on a device what its free memory holds, be it as small as the test bed's."""
    return Shape(64, 256, 2) if device == "cpu" else shape_for(free)


def performance(args):
    """Median step of each algorithm; the same work on the same devices, so what a row takes longer than the row of data
    parallelism is communication that nothing hides, and imbalance."""
    free = free_memory(args.device)
    shape = measured_shape(args.device, free)
    print(f"{shape.layers} layers of {shape.hidden}, {shape.length} tokens, for {free / 2**30:.2f} GiB free\n")
    steps = f"--train-iters {STEPS} --global-batch-size {args.ranks} --lr 1e-4 --position-embedding-type rope"
    common = [*shape.flags, *steps.split(), "--use-flash-attn", *([] if args.device == "cpu" else ["--bf16"])]
    runs = {run.name: run for run in (Run(DATA_PARALLELISM, ""), *possible(args, "algorithms"))}

    def speed(name):
        run = runs[name]
        cp = ["--context-parallel-size", str(args.ranks), *run.flags.split()] if run.flags else []
        return train(args, f"speed {name}", [*common, *cp])

    failures = []
    print(*HEAD, sep="\n")
    for row, failure in rows(shape, args.ranks, runs, speed, RunFailed):
        print(row, flush=True)
        failures += [failure] if failure else []
    print("", *failures, f"{len(runs) - len(failures)} of {len(runs)} rows measured", sep="\n")
    return float("inf") if failures else 0.0


def mindspeed(args):
    """Attention of one layer of the performance rows, beside MindSpeed's own ring."""
    free = free_memory(args.device)
    shape = measured_shape(args.device, free)
    dim = shape.hidden // shape.heads
    print(f"{shape.heads} heads of {dim}, {shape.length} tokens, for {free / 2**30:.2f} GiB free\n")
    sizes = f"--length {shape.length} --heads {shape.heads} --dim {dim} --dtype bfloat16"
    try:
        flags = ["verify_ring", "--device", args.device, *sizes.split()]
        print(torchrun(args.folder / "ring", args.ranks, [Path(__file__).parent], flags))
    except RunFailed as error:
        print(f"MindSpeed's ring: failed, {error}")
        return float("inf")
    return 0.0


def main():
    kinds = {**dict.fromkeys(RUNS, training), "resume": resume, "megatron": megatron}
    kinds |= {"performance": performance, "mindspeed": mindspeed}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(kinds))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "npu"])
    parser.add_argument("--checkout", type=Path, help="of Megatron-LM")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--quick", action="store_true", help="Ulysses and Ring alone, five steps")
    args = parser.parse_args()
    try:
        args.tiny = args.tiny or free_memory(args.device) < SMALL
    except ValueError as error:
        sys.exit(str(error))
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what not in ("megatron", "mindspeed") and not (args.folder / "topics.idx").exists():
        prepare = [sys.executable, SCRIPTS / "prepare_data.py", "--output", args.folder / "topics"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    worst = kinds[args.what](args)
    if args.what not in ("performance", "mindspeed"):
        print(f"largest relative difference: {worst:.1g} of what is allowed (of a training {TOLERANCE:.0e})")
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
