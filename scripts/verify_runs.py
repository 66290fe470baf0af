"""Training runs of scripts/verify_npu.sh: each feature against the same training without context parallelism.

    python scripts/verify_runs.py algorithms FOLDER --ranks 8     twenty steps a run, the embedded trainer
    python scripts/verify_runs.py policies|modes|batches|resume FOLDER --ranks 8
    python scripts/verify_runs.py megatron FOLDER --ranks 8 --checkout DIR    Megatron-LM's own pretrain_gpt.py
    python scripts/verify_runs.py performance FOLDER --ranks 8 [--tiny]       a table of the algorithms

The last line says how it ended; exit status 1 when a run fails or its losses differ.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
TOLERANCE = 1e-3  # relative, loss and gradient norm of every step, float32
TRAINING = (
    "--num-layers 2 --num-attention-heads 16 --train-iters 20 --global-batch-size 8 --lr 3e-4 "
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


RUNS = {
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
        Run("distributed optimizer and recompute", RING, f"--use-distributed-optimizer {RECOMPUTE}"),
        Run("bf16", RING, "--bf16"),
    ),
    "batches": (
        Run("packed documents, ring", RING, DOCUMENTS),
        Run("packed documents, ulysses", ULYSSES, DOCUMENTS),
        Run("unaligned", f"{ULYSSES} --gather-size-calculator dynamic", "--seq-length 125"),
    ),
}
LOOSE = {"bf16": 3e-2}  # the order of the blocks rounds differently


def training_flags(args):
    return [*TRAINING.split(), *SIZES[args.tiny].split()]


def torchrun(ranks, script, flags, module=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*command, *(["-m"] if module else []), *script, *flags], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        raise SystemExit(f"{' '.join(map(str, flags))[-200:]} ended with status {done.returncode}")
    return done.stdout


def train(folder, name, ranks, flags):
    """Step records of one run of the embedded trainer."""
    log = folder / (re.sub(r"\W+", "_", name) + ".jsonl")
    torchrun(ranks, [SCRIPTS / "pretrain_gpt.py"], [*flags, "--data-path", folder / "topics", "--log-file", log])
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


def training(args):
    worst, references = 0.0, {}
    for run in RUNS[args.what]:
        shared = [*training_flags(args), *run.shared.split(), "--tensor-model-parallel-size", str(run.tp)]
        key = run.shared, run.tp
        if key not in references:
            references[key] = train(args.folder, f"without {run.name}", args.ranks, shared)
        flags = [*shared, "--context-parallel-size", str(args.ranks // run.tp), *run.flags.split()]
        difference = gap(train(args.folder, run.name, args.ranks, flags), references[key])
        print(f"{run.name}: {difference:.1e}", flush=True)
        worst = max(worst, difference * TOLERANCE / LOOSE.get(run.name, TOLERANCE))
    return worst


def resume(args):
    """Ten steps with a checkpoint, ten more from it, under context parallelism, then without."""
    flags, save = training_flags(args), str(args.folder / "checkpoint")
    reference = train(args.folder, "without", args.ranks, flags)
    parallel = [*flags, "--context-parallel-size", str(args.ranks), *RING.split()]
    train(args.folder, "first half", args.ranks, [*parallel, "--save", save, "--exit-interval", "10"])
    worst = max(
        gap(train(args.folder, f"second half {len(more)}", args.ranks, [*more, "--load", save])[-10:], reference)
        for more in (parallel, flags)
    )
    print(f"checkpoint and resume: {worst:.1e}")
    return worst


def megatron(args):
    """Megatron-LM's own script; it prints loss and gradient norm with six and three digits."""
    from megatron_lm_cases import LENGTH, MOCK, MODEL

    script, worst = args.checkout / "pretrain_gpt.py", 0.0
    flags = [*MODEL, *LENGTH.split(), *MOCK, "--train-iters", "5", "--global-batch-size", "8"]
    pattern = re.compile(r"lm loss: (\S+) .*grad norm: (\S+) ")

    def run(*more):
        output = torchrun(args.ranks, ["mindspeed_cp.run", script], [*flags, *more], module=True)
        found = [tuple(map(float, pair)) for pair in pattern.findall(output)]
        return [dict(iteration=step, loss=loss, grad_norm=norm) for step, (loss, norm) in enumerate(found)]

    alone = run()
    for algorithm in (RING, ULYSSES):
        difference = gap(run("--context-parallel-size", str(args.ranks), *algorithm.split()), alone)
        print(f"{algorithm.split()[-1]}: {difference:.1e}", flush=True)
        worst = max(worst, difference)
    return worst


def performance(args):
    """Median step of each algorithm; the same work on the same devices, so what a row takes longer than the row of data
    parallelism is communication that nothing hides, and imbalance."""
    layers, hidden, length = (2, 64, 256) if args.tiny else (4, 4096, 32768)
    heads = max(8, hidden // 128)
    shape = f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length {length}"
    steps = (
        f"--train-iters 8 --global-batch-size {args.ranks} --lr 1e-4 --position-embedding-type rope --use-flash-attn"
    )
    common = [*shape.split(), *steps.split(), *([] if args.tiny else ["--bf16"])]
    # Forward and backward: 6 operations a parameter and token, and causal attention's 6 x hidden x length a layer.
    flops = length * args.ranks * layers * (6 * 12 * hidden**2 + 6 * hidden * length)
    print("| algorithm | median step, ms | TFLOPS a device | beyond data parallelism | bytes sent a rank and step |")
    print("|---|---|---|---|---|")
    base = None
    for run in (Run("data parallelism", ""), *RUNS["algorithms"]):
        cp = ["--context-parallel-size", str(args.ranks), *run.flags.split()] if run.flags else []
        records = train(args.folder, f"speed {run.name}", args.ranks, [*common, *cp])[3:]
        seconds = statistics.median(record["seconds"] for record in records)
        base = base or seconds
        sent = statistics.median(record["cp_bytes_per_rank"] for record in records)
        tflops = flops / seconds / args.ranks / 1e12
        print(
            f"| {run.name} | {seconds * 1e3:.0f} | {tflops:.1f} | {seconds / base - 1:+.1%} | {sent:,.0f} |", flush=True
        )
    return 0.0


def main():
    kinds = {**dict.fromkeys(RUNS, training), "resume": resume, "megatron": megatron, "performance": performance}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(kinds))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--checkout", type=Path, help="of Megatron-LM")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what != "megatron" and not (args.folder / "topics.idx").exists():
        prepare = [sys.executable, SCRIPTS / "prepare_data.py", "--output", args.folder / "topics"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    worst = kinds[args.what](args)
    if args.what != "performance":
        print(f"largest relative difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
