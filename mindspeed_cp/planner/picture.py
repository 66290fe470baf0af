"""A picture of the planner's predictions: time over the length of a sequence, a line for each algorithm."""

from collections import defaultdict

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.search import Found
from mindspeed_cp.planner.split import Work
from mindspeed_cp.planner.training import fitting, options
from mindspeed_cp.settings.config import ContextParallelConfig

NONE = "no context parallelism"


def _name(config: ContextParallelConfig) -> str:
    if config.context_parallel_size == 1:
        return NONE
    return config.describe().partition(", cp=")[0].partition(" (")[0]


def layer_milliseconds(found: Found) -> dict[str, float]:
    """Algorithm -> ms of one layer with its fastest setting."""
    best: dict[str, float] = {}
    for candidate in found.candidates:
        best.setdefault(_name(candidate.config), 1e3 * candidate.seconds)
    return best


def training_seconds(
    work: Work, devices: int, memory: float, cluster: Cluster, fixed: dict[str, int]
) -> dict[str, float]:
    """Algorithm -> seconds of a step with its fastest plan; algorithms of which none fits are left out."""
    by_name = defaultdict(list)
    for option in options(work, devices, cluster, fixed)[0]:
        by_name[_name(option.attention.config)].append(option)
    best = {name: next(fitting(work, its_own, memory, cluster), None) for name, its_own in by_name.items()}
    return {name: plan.step.seconds for name, plan in best.items() if plan is not None}


def plot(path: str, found: dict[int, dict[str, float]], unit: str, title: str) -> None:
    """Write the picture; ``found`` maps the length of a sequence to the time of each algorithm, in ``unit``.

    Raises:
        ValueError: there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install matplotlib, or leave it out.") from error
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for length, each in sorted(found.items()):
        for name, time in each.items():
            lines[name].append((length, time))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points), marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel=f"{unit} (prediction)", title=title)
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--plot {path} cannot be written: {error}; name a .png, .svg or .pdf in a folder that exists."
        ) from error
