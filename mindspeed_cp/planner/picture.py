"""A plot of the planner's predictions: time relative to the fastest, one line for each algorithm."""

from collections import defaultdict
from typing import Any

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.fitting import Search
from mindspeed_cp.planner.search import Found
from mindspeed_cp.planner.split import Work, splits
from mindspeed_cp.settings.config import ContextParallelConfig

NONE = "no context parallelism"
LIMIT = 2.0  # times the fastest; slower algorithms are not plotted


def _name(config: ContextParallelConfig) -> str:
    if config.context_parallel_size == 1:
        return NONE
    return config.describe().partition(", cp=")[0].partition(" (")[0]


def layer_milliseconds(found: Found) -> dict[str, float]:
    """Return algorithm -> milliseconds of one layer with its fastest setting."""
    best: dict[str, float] = {}
    for candidate in found.candidates:
        best.setdefault(_name(candidate.config), 1e3 * candidate.seconds)
    return best


def training_seconds(
    work: Work, devices: int, memory: float, cluster: Cluster, fixed: dict[str, int]
) -> dict[str, float]:
    """Return algorithm -> seconds of a step with its fastest plan, without algorithms of which no plan fits, and
    without those that take more than LIMIT times as long as the fastest.
    """
    best: dict[str, float] = {}
    some = list(splits(work, devices, cluster, fixed, {}))
    by_algorithm = lambda split, recompute, config: _name(config) if config else None  # noqa: E731
    for plan in Search(work, memory, cluster, by_algorithm).fitting(some):
        if plan.step.seconds > LIMIT * min(best.values(), default=plan.step.seconds):
            break
        best.setdefault(_name(plan.attention.config), plan.step.seconds)
    return best


def plot(path: str, found: dict[int, dict[str, float]], unit: str, title: str) -> None:
    """Write the plot: the time of every algorithm relative to the fastest one, and a mark where nothing fits.

    Args:
        found: sequence length -> algorithm -> time in ``unit``; empty if nothing fits.

    Raises:
        ValueError: there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install matplotlib, or leave it out.") from error
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    _draw(figure.subplots(), found, unit, title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--plot {path} cannot be written: {error}; name a .png, .svg or .pdf in a folder that exists."
        ) from error


def _draw(axes: Any, found: dict[int, dict[str, float]], unit: str, title: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for length, each in sorted(found.items()):
        for name, time in each.items():
            if time <= LIMIT * min(each.values()):
                lines[name].append((length, time / min(each.values())))
    heights: list[float] = []
    for name, points in sorted(lines.items(), key=lambda line: line[1][-1][1]):
        (drawn,) = axes.plot(*zip(*points), marker="o", markersize=3)
        height = max([points[-1][1], *(taken + 0.05 for taken in heights)])  # labels must not overlap
        heights.append(height)
        axes.annotate(
            name, points[-1], (8, 72 * (height - points[-1][1])), textcoords="offset points", color=drawn.get_color(),
            va="center", fontsize=8,
        )  # fmt: skip
    for length in (length for length, each in found.items() if not each):
        axes.plot([length], [1.0], marker="x", markersize=9, color="black")
        axes.annotate("nothing fits", (length, 1.0), (0, 10), textcoords="offset points", ha="center", fontsize=8)
    fastest = ", ".join(f"{length:,}: {min(each.values()):,.3g}" for length, each in sorted(found.items()) if each)
    axes.set(xlabel=f"tokens of a sequence (fastest, {unit}, a prediction: {fastest})", title=title)
    axes.set_ylabel("time relative to the fastest")
    axes.xaxis.label.set_size(7)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.25)
    axes.grid(alpha=0.3)
