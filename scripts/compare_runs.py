"""Compare the losses of several runs: a table, the largest difference, communicated bytes, a plot.

    python scripts/compare_runs.py --tolerance 1e-4 --plot loss.png "cp=1=runs/cp1.jsonl" "Ring cp=4=runs/ring.jsonl"

Each argument is NAME=FILE, with FILE written by scripts/pretrain_gpt.py --log-file, or what Megatron-LM's own script
printed; the first run is the reference. Exit status 1 if the relative difference of a loss from the reference exceeds
the tolerance.
"""

import argparse
import json
import re
import statistics
import sys

from rich.console import Console
from rich.table import Table


STEP = re.compile(r"iteration +(\d+)/ *\d+ \|.*?lm loss: (\S+)")  # of Megatron-LM


def read_run(path):
    """The steps of a --log-file or of Megatron-LM's output; validations are left out."""
    with open(path, encoding="utf-8") as file:
        lines = file.readlines()
    if lines and lines[0].startswith("{"):
        return [record for record in map(json.loads, lines) if "loss" in record]
    steps = filter(None, map(STEP.search, lines))
    return [{"iteration": int(step[1]), "loss": float(step[2])} for step in steps]


def largest_difference(run, reference):
    """Largest relative difference of two runs' losses; infinite if their steps differ or a loss is NaN."""
    if [record["iteration"] for record in run] != [record["iteration"] for record in reference] or not run:
        return float("inf")
    differences = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(run, reference, strict=True)]
    return max((d if d == d else float("inf")) for d in differences)


def table(runs):
    result = Table(title="Loss step by step")
    result.add_column("step", justify="right")
    for name in runs:
        result.add_column(name, justify="right")
    columns = list(runs.values())
    for rows in zip(*columns, strict=False):
        result.add_row(str(rows[0]["iteration"]), *(f"{row['loss']:.6f}" for row in rows))
    result.add_section()
    result.add_row("difference", "", *(f"{largest_difference(run, columns[0]):.1e}" for run in columns[1:]))
    if all(run and "tokens_per_second" in run[-1] for run in columns):
        result.add_row("bytes per rank and step", *(f"{run[-1]['cp_bytes_per_rank']:,.0f}" for run in columns))
        speeds = [statistics.median(record["tokens_per_second"] for record in run) for run in columns]
        result.add_row("tokens/s", *(f"{speed:,.0f}" for speed in speeds))
    return result


def plot(runs):
    """Loss curves as a figure; since the lines coincide, each is thinner than the previous one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, (name, run) in enumerate(runs.items()):
        axes.plot(
            [record["iteration"] for record in run],
            [record["loss"] for record in run],
            label=name,
            linewidth=max(7 - 2.5 * index, 1),
            linestyle="-" if index < 2 else "--",
        )
    axes.set(xlabel="step", ylabel="loss", title="The same training, with and without context parallelism")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE", help="a name and a --log-file, or Megatron's output")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference (default: 1e-4)")
    parser.add_argument("--plot", metavar="PNG", help="where to save the picture of the losses")
    args = parser.parse_args(argv)
    runs = {name: read_run(path) for name, _, path in (run.rpartition("=") for run in args.runs)}
    Console(width=None if sys.stdout.isatty() else 100).print(table(runs))
    if args.plot:
        plot(runs).savefig(args.plot, dpi=120)
        print(f"loss curves: {args.plot}")
    first, *others = runs.values()
    difference = max((largest_difference(run, first) for run in others), default=0.0)
    verdict = "within" if difference <= args.tolerance else "ABOVE"
    print(f"largest relative difference of a loss: {difference:.1e}, {verdict} the tolerance of {args.tolerance:.0e}")
    return 0 if difference <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
