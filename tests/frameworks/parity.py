"""Runs of each framework, compared with its own without context parallelism; as a program it prints the table.

bash scripts/test_frameworks.sh --table
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import megatron_bridge_runs
import ms_swift_runs
import verl_runs
from algorithms import ALGORITHMS, ALONE

HERE = Path(__file__).parent
BOUND = 1e-5
ORDERS = {"ours": "mindspeed_cp first", "theirs": "the framework first"}
SUBJECTS = {  # (framework, order) -> what is trained (models, engines, recipes), and its batches
    ("ms_swift", "ours"): (tuple(ms_swift_runs.MODELS), tuple(ms_swift_runs.BATCHES)),
    ("ms_swift", "theirs"): (tuple(ms_swift_runs.MODELS), tuple(ms_swift_runs.BATCHES)),
    ("verl", "ours"): (verl_runs.OF_ORDER["ours"], tuple(verl_runs.BATCHES)),
    ("verl", "theirs"): (verl_runs.OF_ORDER["theirs"], tuple(verl_runs.BATCHES)),
    ("megatron_bridge", "ours"): (megatron_bridge_runs.RECIPES, ("rows",)),
    ("megatron_bridge", "theirs"): (megatron_bridge_runs.RECIPES, ("rows",)),
}
FRAMEWORKS = tuple(dict.fromkeys(framework for framework, _ in SUBJECTS))
PACKAGES = ("ms-swift", "mcore-bridge", "verl", "mbridge", "megatron-bridge", "megatron-core", "transformers", "torch")


def run(framework, order):
    """name -> what each rank found, or what it said when it failed; a process of its own, for the order of imports."""
    command = [sys.executable, str(HERE / f"{framework}_runs.py"), order]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=1800)
    if result.returncode != 0:
        raise AssertionError(result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])


def difference(found, subject, batch, algorithm):
    """Largest relative difference of losses, gradient norms and log-probabilities from those without."""
    alone, ranks = (found[f"{subject}, {batch}, {name}"] for name in (ALONE, algorithm))
    for result in (alone, ranks):
        assert not isinstance(result, str), result
    (expected, calls, _), *_ = alone
    assert calls > 0 and len(expected) >= 3, "Transformer Engine's attention computes without context parallelism"
    assert abs(expected[0][0] - expected[2][0]) > 1e-2, "it learns"
    errors = []
    for rank, (steps, calls, described) in enumerate(ranks):
        assert calls == 0, "no attention of Transformer Engine's was called"
        assert described.startswith(algorithm), described
        assert len(steps) == len(expected)
        for (loss, norm), (expected_loss, expected_norm) in zip(steps, expected):
            pairs = [(loss, expected_loss), (norm, expected_norm)][: 1 + (rank == 0)]  # verl: the first rank's norm
            errors += [abs(a - b) / max(abs(b), 1e-3) for a, b in pairs]
    return max(errors)


def rows(framework, order):
    """Markdown rows: subject, batch, order, the losses without, the difference for each algorithm."""
    found = run(framework, order)
    subjects, batches = SUBJECTS[framework, order]
    for subject in subjects:
        for batch in batches:
            errors = [difference(found, subject, batch, name) for name in ALGORITHMS]
            assert max(errors) < BOUND, (subject, batch, errors)
            first, *_, last = [loss for loss, _ in found[f"{subject}, {batch}, {ALONE}"][0][0][:3]]
            cells = [f"{error:.0e}" for error in errors]
            what = [framework.replace("_", "-"), subject, batch, ORDERS[order], f"{first:.4f} to {last:.4f}"]
            yield f"| {' | '.join([*what, *cells])} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FRAMEWORKS), choices=FRAMEWORKS, help="these frameworks")
    options = parser.parse_args(argv)
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES)
    print(f"{versions}; float32, Transformer Engine's classes on the CPU.\n")
    titles = [f"{name}, cp={size}" for name, (size, _) in ALGORITHMS.items()]
    head = [
        "framework",
        "model, engine or recipe",
        "batch",
        "who is imported first",
        "loss, cp=1, steps 1 to 3",
        *titles,
    ]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for framework, order in SUBJECTS:
        if framework in options.only:
            for row in rows(framework, order):
                print(row, flush=True)


if __name__ == "__main__":
    main()
