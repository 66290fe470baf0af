"""Run the unchanged pretrain_gpt.py of one Megatron-LM checkout, many times: what it takes to import is paid once.

    python tests/check/megatron_lm_runs.py CHECKOUT < runs.json > results.jsonl

Input: a list of {"name", "world", "flags", "adaptor"}. Output: one line per run, {"name", "losses", "grad_norms",
"error"}. Every rank is a fork of this process in which Megatron is imported already; it enters through
mindspeed_cp.run, as with torchrun. With "adaptor": false only the stand-in for CUDA is applied, to compare with
Megatron as it is (own process:
--stand-in-only).
"""

import argparse
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import forked

TIMEOUT = 240  # seconds of one run


def _apply_stand_in_only():
    """Make CUDA's names mean the CPU and change nothing else: Megatron as it is, as far as a CPU can show it."""
    from mindspeed_cp.patches.checkout import without_checkout
    from mindspeed_cp.patches.machine import checkout, cpu, libraries
    from mindspeed_cp.patches.manager import PatchManager
    from mindspeed_cp.patches.rows import patches_of

    manager = PatchManager(patches_of([cpu, libraries]) + patches_of([checkout], None, without_checkout))
    manager.apply()
    return manager


def _record_steps(records):
    """Keep loss and gradient norm of every step in full precision; Megatron prints three to six digits."""
    import megatron.training.training as training

    original = training.train_step

    def train_step(*args, **kwargs):
        result = original(*args, **kwargs)
        losses = {
            name: float(value[0] / value[1]) if isinstance(value, (list, tuple)) else float(value)
            for name, value in result[0].items()
        }
        records.append({"loss": losses.get("lm loss"), "grad_norm": float(result[5])})
        return result

    training.train_step = train_step


def _run_script(script, adaptor):
    sys.path[0] = str(script.parent)
    if adaptor:  # as python -m mindspeed_cp.run does
        sys.argv.insert(1, str(script))
        runpy.run_module("mindspeed_cp.run", run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = str(script)
        runpy.run_path(str(script), run_name="__main__")


def _life(script, run, folder, results_fd, rank):
    """A rank leaves folder/rank-N.json; no rank may keep the pipe of the results open."""
    os.close(results_fd)
    records, error = [], None
    sys.argv = ["-", *run["flags"]]
    try:
        _record_steps(records)
        _run_script(script, run.get("adaptor", True))
    except SystemExit as stop:
        error = f"exit status {stop.code}" if stop.code else None
    except BaseException as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    (folder / f"rank-{rank}.json").write_text(json.dumps({"records": records, "error": error}))
    sys.exit(1 if error else 0)


def run_one(script, run, results_fd):
    """Start the ranks of one run and collect what they recorded."""
    with tempfile.TemporaryDirectory(prefix="megatron-") as name:
        folder, world = Path(name), run["world"]
        logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        ranks = forked.start(
            world, lambda rank: (logs[rank], logs[rank]), partial(_life, script, run, folder, results_fd)
        )
        statuses = forked.finish(ranks, TIMEOUT, lambda rank, status: 10.0)
        failed = len(statuses) < world or any(statuses.values())
        answers = [
            json.loads(path.read_text()) if path.exists() else {"records": [], "error": "ended without an answer"}
            for path in (folder / f"rank-{rank}.json" for rank in range(world))
        ]
        errors = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if answer["error"]]
        if failed or errors:
            print("\n".join(log.read_text(errors="replace")[-3000:] for log in logs), file=sys.stderr, flush=True)
    # The loss is known on the last pipeline stage, which holds the last ranks.
    records = answers[-1]["records"]
    return {
        "name": run["name"],
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "error": "; ".join(errors) or ("failed" if failed else None),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder with pretrain_gpt.py")
    parser.add_argument("--stand-in-only", action="store_true", help="do not import the adaptor")
    args = parser.parse_args()
    runs, checkout = json.load(sys.stdin), args.checkout.resolve()
    sys.path.insert(0, str(checkout))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if args.stand_in_only:
        keep = _apply_stand_in_only()  # noqa: F841  must stay alive
    else:
        import mindspeed_cp.megatron_adaptor  # noqa: F401
    import megatron.training  # noqa: F401  imported once, for all forks

    for run in runs:
        start = time.monotonic()
        result = run_one(checkout / "pretrain_gpt.py", {**run, "adaptor": not args.stand_in_only}, results.fileno())
        print(json.dumps({**result, "seconds": round(time.monotonic() - start, 1)}), file=results, flush=True)


if __name__ == "__main__":
    main()
