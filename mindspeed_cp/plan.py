"""Predict which setting of context parallelism is fastest for a model on a cluster, and why.

    python -m mindspeed_cp.plan --model llama2-70b --tp 8 --cp 4 --seq-length 131072 --cluster a100
    python -m mindspeed_cp.plan --model llama2-7b --devices 64 --global-batch 64 --seq-length 131072 --cluster a100

    python -m mindspeed_cp.plan --cluster a100 --launch "bash scripts/launch/llama2.sh 7b"

With --cp it plans one attention layer, forward and backward; with --devices a whole training, over all splits of the
devices. Bytes are those that the engine itself sends; times are predicted from peak rates. Model and sizes can also
come from Megatron's own flags after --, or from a launch command.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from mindspeed_cp.planner import calibrate, report
from mindspeed_cp.planner import given as given_flags
from mindspeed_cp.planner.cluster import THIS_MACHINE, Cluster
from mindspeed_cp.planner.documents import Boundaries, boundaries
from mindspeed_cp.planner.fitting import plans
from mindspeed_cp.planner.memory import most_bytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.search import Found, flags, hiding_tokens
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.timing import Candidate
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.planner.training import attention, is_tight, problem_of
from mindspeed_cp.settings.fields import KV_CACHE_POLICIES

EVERYTHING = 200  # maximum number of plans in JSON
PREDICTION = "prediction, not measured on this hardware"


def _documents(given: argparse.Namespace) -> Boundaries | tuple[Boundaries, ...] | None:
    if given.documents is None:
        if given.pack:
            raise ValueError("--pack distributes documents over rows, and there are none; add --documents.")
        return None
    return boundaries(given.documents, given.seq_length, given.micro_batch, given.pack)


def _record(candidate: Candidate, problem: Problem) -> dict[str, object]:
    memory = most_bytes(candidate.config, problem)
    return {
        "setting": candidate.config.describe(),
        "flags": flags(candidate.config),
        "seconds": candidate.seconds,
        "compute_seconds": candidate.compute,
        "exposed_seconds": candidate.exposed,
        "intra_bytes": candidate.intra_bytes,
        "inter_bytes": candidate.inter_bytes,
        "memory_bytes": dataclasses.asdict(memory),
        "reason": report.reason(candidate),
    }


def _assumed(cluster: Cluster, name: str) -> str:
    within, between = cluster.intra_bandwidth / 1e9, cluster.inter_bandwidth / 1e9
    basis = "Measured here, now" if name == THIS_MACHINE else f"Assumed ({name})"
    links = f"{cluster.links} x " if cluster.links > 1 else ""
    shared = f" for {cluster.devices_per_adapter} devices" if cluster.devices_per_adapter > 1 else ""
    return (
        f"{basis}: of {cluster.flops / 1e12:.4g} TFLOP/s large products reach {cluster.compute_efficiency:.0%}, "
        f"attention {cluster.attention_efficiency:.0%}; "
        f"{cluster.link_efficiency:.0%} of {links}{within:.4g} GB/s within "
        f"and {between:.4g} GB/s{shared} between nodes of {cluster.devices_per_node}, {cluster.latency * 1e6:,.0f} us."
    )


def _json(given: argparse.Namespace, cluster: Cluster, **found: object) -> None:
    described = {"name": given.cluster, **dataclasses.asdict(cluster)}
    print(json.dumps({"basis": PREDICTION, "cluster": described, **found}, indent=2))


def _hides(found: Found, problem: Problem, cluster: Cluster, mask_type: str) -> dict[bool, float]:
    """Whether a ring crosses nodes -> fewest tokens of a rank that hide what the best setting sends."""
    elements = problem.row_elements(found.candidates[0].config) if found.candidates else None
    return {inter: hiding_tokens(problem, cluster, inter, mask_type == "causal", elements) for inter in (False, True)}


def _text(found: Found, cluster: Cluster, problem: Problem, given: argparse.Namespace) -> str:
    lines = [
        f"One attention layer, forward and backward, slowest rank: {PREDICTION}.",
        _assumed(cluster, given.cluster),
        "",
    ]
    lines.append(f"{'ms':>9} {'compute':>9} {'exposed':>9}  setting")
    for best in found.candidates[:5]:
        times = " ".join(f"{1e3 * seconds:9.2f}" for seconds in (best.seconds, best.compute, best.exposed))
        memory = most_bytes(best.config, problem)
        more = (memory.passing + memory.buffers) / 1e6
        held = f"keeps {memory.saved / 1e6:,.0f} MB for backward, {more:,.0f} MB more"
        lines += [f"{times}  {best.config.describe()}", f"{'':31}{report.reason(best)}; {held} while it runs"]
    lines += ["", *(f"Excluded: {name}: {rule}" for name, rule in found.excluded.items())]
    local = given.seq_length / given.cp
    for inter, least in _hides(found, problem, cluster, given.mask_type).items():
        where = "between nodes" if inter else "within a node"
        lines.append(
            f"A ring {where} hides from {least:,.0f} tokens per rank; here {local:,.0f}, {local / least:.2f} x that."
        )
    if found.candidates:
        lines += ["", "Flags of the first: " + flags(found.candidates[0].config)]
    return "\n".join(lines)


def _run(given: argparse.Namespace) -> int:
    if given.calibrate:
        calibrate.save(calibrate.measured(given.device), given.calibrate)
        print(_assumed(calibrate.read_cluster(given.calibrate), given.calibrate).replace("Assumed", "Measured", 1))
        return 0
    described = given.model or given.hf_config or given.line
    needed = {"--model, --hf-config or Megatron's flags": described, "--seq-length": given.seq_length}
    missing = [flag for flag, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not given; a plan needs all of them, --calibrate none.")
    model = given_flags.model(given)
    if given.devices is None and given.cp is None:
        raise ValueError("--cp is not given; give it for one attention layer, or --devices for a whole training.")
    if given.cluster is None:
        given.cluster, why = calibrate.default_cluster()
        given.notes.insert(0, f"Planned for {given.cluster}: {why}.")
    for note in given.notes:
        print(note, file=sys.stderr if given.json or given.shell else sys.stdout)
    names = [field.name for field in dataclasses.fields(Cluster)]
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    cluster = dataclasses.replace(calibrate.read_cluster(given.cluster, given.device), **changes)
    given.memory = cluster.memory
    return _plan_layer(given, model, cluster) if given.devices is None else _plan_training(given, model, cluster)


def _name(given: argparse.Namespace) -> str:
    return str(given.model or given.hf_config or "Megatron's flags")


def _work(given: argparse.Namespace, model: ModelShape) -> Work:
    batch = given.global_batch or given.devices or 1
    return Work(model, given.seq_length, batch, given.micro_batch, given.mask_type, _documents(given))


def _plan_training(given: argparse.Namespace, model: ModelShape, cluster: Cluster) -> int:
    work = _work(given, model)
    if given.shell and (model.experts or given.documents):
        what = "--documents" if given.documents else "experts"
        raise ValueError(f"--shell has no variables for {what}; leave it out and take the flags of the plan.")
    sizes = ("tp", "pp", "vpp", "cp", "ep", "etp")
    fixed = {name: getattr(given, name) for name in sizes if getattr(given, name) is not None}
    if given.plot:
        found_of = {
            at.seq_length: report.training_seconds(_work(at, model), given.devices, given.memory, cluster, fixed)
            for at in _at_lengths(given)
        }
        title = f"{_name(given)}, {given.devices} devices, {given.cluster}"
        report.plot(given.plot, found_of, "seconds of a step", title)
    # The launch scripts have no variable for a shorter last stage.
    most = EVERYTHING if given.json else report.SHOWN
    with report.progress() as note:
        found, excluded = plans(
            work, given.devices, given.memory, cluster, fixed, most=most, even_stages=given.shell, note=note
        )
    if given.json:
        _json(
            given,
            cluster,
            plans=[report.record(plan, work, cluster, given.memory) for plan in found],
            excluded=excluded,
            parameters={"total": model.parameters, "active": model.active_parameters},
        )
    elif not found:
        print(f"mindspeed-cp plan: nothing fits: {excluded.get('everything', 'in equal stages')}", file=sys.stderr)
    elif given.shell and is_tight(found[0], given.memory):
        left = f"{found[0].memory.total / 1e9:.1f} of {given.memory / 1e9:.1f} GB"
        print(
            f"mindspeed-cp plan: nothing leaves a tenth of the memory free (the best needs {left}); use more devices, "
            "or choose CP yourself.",
            file=sys.stderr,
        )
        return 1
    elif given.shell:
        print("\n".join(report.shell(found[0])))
    else:
        batch, documents = work.global_batch, f", documents of {given.documents}" if given.documents else ""
        lines = [f"{given.devices} devices, {batch} sequences of {given.seq_length} tokens{documents}: {PREDICTION}."]
        active = f", {model.active_parameters / 1e9:,.1f} B active for a token" if model.experts else ""
        lines.append(f"{_name(given)}: {model.parameters / 1e9:,.1f} B parameters{active}.")
        lines += [_assumed(cluster, given.cluster), "", *report.text(found, work, cluster, given.memory), ""]
        lines += [f"Excluded: {what}: {rule}" for what, rule in excluded.items()]
        print("\n".join([*lines, "", "Flags of the first: " + report.megatron_flags(found[0])]))
    return 0 if found else 1


def _at_lengths(given: argparse.Namespace) -> list[argparse.Namespace]:
    """The same options for lengths from a sixteenth of the given one to four times it."""
    lengths = {given.seq_length * 2**power // 16 for power in range(0, 7)} - {0}
    return [argparse.Namespace(**{**vars(given), "seq_length": length}) for length in sorted(lengths)]


def _plan_layer(given: argparse.Namespace, model: ModelShape, cluster: Cluster) -> int:
    split = Split(given.tp or 1, 1, given.cp, 1)

    def searched(at: argparse.Namespace) -> Found:
        return attention(_work(at, model), split, cluster, KV_CACHE_POLICIES)

    if given.plot:
        times = {at.seq_length: report.layer_milliseconds(searched(at)) for at in _at_lengths(given)}
        title = f"{_name(given)}, cp {given.cp}, tp {split.tp}, {given.cluster}"
        report.plot(given.plot, times, "ms of one layer", title)
    found, problem = searched(given), problem_of(_work(given, model), split)
    if given.json:
        hides = _hides(found, problem, cluster, given.mask_type)
        _json(
            given,
            cluster,
            candidates=[_record(candidate, problem) for candidate in found.candidates],
            excluded=found.excluded,
            ring_hides_from_tokens={"intra": hides[False], "inter": hides[True]},
        )
    else:
        print(_text(found, cluster, problem, given))
    return 0 if found.candidates else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns 0, 1 if no setting works, or 2 for a wrong flag."""
    try:
        return _run(given_flags.read(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        print(f"mindspeed-cp plan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
