"""A picture of the planner's predictions: time of one attention layer against the length, a line for each algorithm."""

from collections import defaultdict

from mindspeed_cp.planner.search import Found


def best_of_each(found: Found) -> dict[str, float]:
    """Algorithm -> seconds of its fastest setting."""
    best: dict[str, float] = {}
    for candidate in found.candidates:
        best.setdefault(candidate.config.describe().partition(", cp=")[0].partition(" (")[0], candidate.seconds)
    return best


def plot(path: str, found: dict[int, Found], title: str) -> None:
    """Write the picture; ``found`` maps the length of a sequence to what was found for it.

    Raises:
        ValueError: there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install matplotlib, or leave it out.") from error
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for length, each in sorted(found.items()):
        for name, seconds in best_of_each(each).items():
            lines[name].append((length, 1e3 * seconds))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points), marker="o", markersize=3, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="ms of one layer (prediction)", title=title
    )
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--plot {path} cannot be written: {error}; name a .png, .svg or .pdf in a folder that exists."
        ) from error
