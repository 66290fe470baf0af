"""What the planner says: plans as text, flags, shell variables and JSON, a plot, and a progress line on a terminal."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mindspeed_cp.arguments.declared import variables_of
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.fitting import Note, Search
from mindspeed_cp.planner.search import Found, flags
from mindspeed_cp.planner.split import Work, sizes, splits
from mindspeed_cp.planner.timing import Candidate
from mindspeed_cp.planner.training import MARGIN, Plan, is_tight, tokens_per_second, utilization
from mindspeed_cp.settings.config import ContextParallelConfig

SHOWN = 5
NONE = "no context parallelism"
LIMIT = 2.0  # times the fastest; slower algorithms are not plotted
EVERY = 0.5  # seconds between updates of the progress line


def reason(candidate: Candidate) -> str:
    """One sentence about what the time of attention consists of."""
    sent = f"sends {candidate.intra_bytes / 1e6:,.0f} MB within and {candidate.inter_bytes / 1e6:,.0f} MB between nodes"
    if candidate.exposed < 0.01 * candidate.seconds:
        return f"{sent}, hidden behind {candidate.compute * 1e3:,.1f} ms of attention"
    return f"{sent}, of which {candidate.exposed * 1e3:,.1f} ms are not hidden"


def text(found: list[Plan], work: Work, cluster: Cluster, memory: float) -> list[str]:
    """The best plans, one after another; those that leave less than a tenth of the memory free are marked."""
    lines = []
    for number, plan in enumerate(found[:SHOWN], 1):
        step, held = plan.step, plan.memory
        parts = {
            "compute": step.compute, "context parallelism": step.context, "tensor": step.tensor,
            "expert": step.expert, "between stages": step.pipeline, "data": step.data, "bubble": step.bubble,
        }  # fmt: skip
        bytes_of = {name: value for name, value in vars(held).items() if value}
        lines += [
            f"{number}. {tokens_per_second(work, plan):,.0f} tokens/s, MFU {utilization(work, plan, cluster):.0%}: "
            f"{sizes(plan.split)}; "
            f"{_setting(plan)}; recompute {plan.recompute}",
            f"   step {step.seconds:.2f} s: "
            + ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value),
            f"   memory {held.total / 1e9:.1f} GB: "
            + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in bytes_of.items())
            + (f"; above {MARGIN:.0%} of the device's, which may not suffice" if is_tight(plan, memory) else ""),
        ]
        if plan.split.cp > 1:
            lines.append(f"   a layer {reason(plan.attention)}")
    return lines


def _setting(plan: Plan) -> str:
    return plan.attention.config.describe() if plan.split.cp > 1 else "no context parallelism"


def megatron_flags(plan: Plan) -> str:
    """Megatron's flags of a plan, to paste."""
    split = plan.split
    line = f"--tensor-model-parallel-size {split.tp} --pipeline-model-parallel-size {split.pp}"
    line += " --sequence-parallel" if split.tp > 1 else ""
    if split.last_layers:
        line += f" --decoder-last-pipeline-num-layers {split.last_layers}"
    if split.ep:
        line += f" --expert-model-parallel-size {split.ep} --expert-tensor-parallel-size {split.etp}"
        line += " --moe-token-dispatcher-type alltoall"  # as planned; Megatron's default gathers all tokens
    if split.vpp > 1:
        line += f" --num-virtual-stages-per-pipeline-rank {split.vpp}"
    if split.ends:
        line += " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    line += " --use-distributed-optimizer"  # memory is planned with sharded optimizer states
    if split.dp * split.cp > 1:  # to overlap data-parallel communication with a micro batch
        line += " --overlap-grad-reduce --overlap-param-gather"
    if plan.recompute != "none":
        line += " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    if plan.recompute == "full, attention kept" and split.cp > 1:
        line += " --cp-keep-attention"
    return f"{line} {flags(plan.attention.config)}" if split.cp > 1 else line


def shell(plan: Plan) -> list[str]:
    """Assignments of the launch scripts' variables for a plan."""
    values = {
        "TP": plan.split.tp,
        "PP": plan.split.pp,
        **variables_of(plan.attention.config),
        "RECOMPUTE": "none" if plan.recompute == "none" else "full",
        "KEEP_ATTENTION": int(plan.recompute == "full, attention kept"),
    }
    return [f"{name}={value}" for name, value in values.items()]


def record(plan: Plan, work: Work, cluster: Cluster, memory: float) -> dict[str, object]:
    """A plan as values for JSON."""
    return {
        "split": vars(plan.split),
        "setting": _setting(plan),
        "recompute": plan.recompute,
        "tokens_per_second": tokens_per_second(work, plan),
        "mfu": utilization(work, plan, cluster),
        "above_nine_tenths_of_memory": is_tight(plan, memory),
        "step_seconds": {**vars(plan.step), "total": plan.step.seconds},
        "memory_bytes": {**vars(plan.memory), "total": plan.memory.total},
        "flags": megatron_flags(plan),
        "reason": reason(plan.attention) if plan.split.cp > 1 else "no context parallelism",
    }


@contextmanager
def progress() -> Iterator[Note]:
    """Yield a function that says on a terminal how many ways to train are decided, at most once every EVERY seconds."""
    last, shown = time.monotonic(), False

    def note(decided: int, of: int) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if sys.stderr.isatty() and now - last >= EVERY:
            last, shown = now, True
            print(f"\rplanning: checked {decided} of {of} ways to train", end="", file=sys.stderr, flush=True)

    try:
        yield note
    finally:
        if shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


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
        for name, taken in each.items():
            if taken <= LIMIT * min(each.values()):
                lines[name].append((length, taken / min(each.values())))
    heights: list[float] = []
    for name, points in sorted(lines.items(), key=lambda line: line[1][-1][1]):
        (drawn,) = axes.plot(*zip(*points), marker="o", markersize=3)
        height = max([points[-1][1], *(other + 0.05 for other in heights)])  # labels must not overlap
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
