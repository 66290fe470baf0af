"""Predict which setting of context parallelism is fastest for a model on a cluster, and why.

    python -m mindspeed_cp.plan --model llama2-70b --tp 8 --cp 4 --seq-length 131072 --cluster a100
    python -m mindspeed_cp.plan --model llama2-7b --devices 64 --global-batch 64 --seq-length 131072 --cluster a100

With --cp one attention layer, forward and backward; with --devices a whole training, every split of the devices. Bytes
are those of the engine itself; times are a prediction from peak rates.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from mindspeed_cp.config import MASK_TYPES, TrainingSetup
from mindspeed_cp.planner import calibrate, report
from mindspeed_cp.planner.cluster import CLUSTERS, Cluster
from mindspeed_cp.planner.documents import boundaries
from mindspeed_cp.planner.hugging_face import hf_model
from mindspeed_cp.planner.models import MODELS, ModelShape, named_model
from mindspeed_cp.planner.picture import plot
from mindspeed_cp.planner.report import reason
from mindspeed_cp.planner.search import Candidate, Found, flags, hiding_tokens, search
from mindspeed_cp.planner.split import Work
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.planner.training import plans
from mindspeed_cp.rules import heads_of_rank

PREDICTION = "prediction, not measured on this hardware"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mindspeed-cp plan", description=__doc__.partition("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    model.add_argument("--hf-config", help="a Hugging Face config.json")
    parser.add_argument("--devices", type=int, help="plan a whole training on so many; sizes that are given stay")
    parser.add_argument("--tp", type=int, help="tensor parallel size (default: 1, with --devices any)")
    parser.add_argument("--pp", type=int, help="with --devices: pipeline parallel size")
    parser.add_argument("--cp", type=int, help="context parallel size; needed without --devices")
    parser.add_argument("--global-batch", type=int, help="with --devices: sequences of a step (default: --devices)")
    parser.add_argument("--memory", type=float, default=64e9, help="with --devices: bytes of a device (default: 64e9)")
    parser.add_argument("--seq-length", type=int, help="tokens")
    parser.add_argument("--documents", help="packed documents: a dataset's .idx, or lognormal:6.5,1.3 and the like")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences")
    parser.add_argument("--mask-type", choices=[name for name in MASK_TYPES if name != "general"], default="causal")
    parser.add_argument("--policies", action="store_true", help="KV cache policies too; their memory is not predicted")
    parser.add_argument(
        "--cluster", help=f"{', '.join(CLUSTERS)}, or a file of --calibrate; the flags below override it"
    )
    parser.add_argument("--calibrate", metavar="FILE.yaml", help="measure this machine, write the file, plan nothing")
    parser.add_argument("--device", choices=calibrate.SIZES, default="cpu", help="that --calibrate measures")
    for field in dataclasses.fields(Cluster):
        kind = int if field.name == "devices_per_node" else float
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, help="bytes/s, FLOP/s, seconds or a share")
    parser.add_argument(
        "--shell", action="store_true", help="with --devices: the first as variables of the launch scripts"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="without --devices: time over the length, for each algorithm"
    )
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    return parser


def _positive(given: argparse.Namespace) -> None:
    for name in ("devices", "tp", "pp", "cp", "seq_length", "global_batch", "micro_batch", "memory"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1.")


def _problem(given: argparse.Namespace, model: ModelShape) -> Problem:
    tp = given.tp or 1
    heads = heads_of_rank(model.num_heads, model.num_kv_heads, tp)
    sizes = *heads, model.dk, model.dv
    return Problem(given.seq_length, *sizes, batch=given.micro_batch, stride=tp, cu_seqlens=_documents(given))


def _documents(given: argparse.Namespace) -> tuple[int, ...] | None:
    return None if given.documents is None else boundaries(given.documents, given.seq_length)


def _record(candidate: Candidate) -> dict[str, object]:
    return {
        "setting": candidate.config.describe(),
        "flags": flags(candidate.config),
        "seconds": candidate.seconds,
        "compute_seconds": candidate.compute,
        "exposed_seconds": candidate.exposed,
        "intra_bytes": candidate.intra_bytes,
        "inter_bytes": candidate.inter_bytes,
        "reason": reason(candidate),
    }


def _assumed(cluster: Cluster) -> str:
    within, between = cluster.intra_bandwidth / 1e9, cluster.inter_bandwidth / 1e9
    return (
        f"Assumed: {cluster.compute_efficiency:.0%} of {cluster.flops / 1e12:,.0f} TFLOP/s; "
        f"{cluster.link_efficiency:.0%} of {within:,.0f} GB/s within and {between:,.0f} GB/s between nodes of "
        f"{cluster.devices_per_node}, {cluster.latency * 1e6:,.0f} us."
    )


def _text(found: Found, cluster: Cluster, problem: Problem, given: argparse.Namespace) -> str:
    lines = [f"One attention layer, forward and backward, slowest rank: {PREDICTION}.", _assumed(cluster), ""]
    lines.append(f"{'ms':>9} {'compute':>9} {'exposed':>9}  setting")
    for best in found.candidates[:5]:
        times = " ".join(f"{1e3 * seconds:9.2f}" for seconds in (best.seconds, best.compute, best.exposed))
        lines += [f"{times}  {best.config.describe()}", f"{'':31}{reason(best)}"]
    lines += ["", *(f"Excluded: {name}: {rule}" for name, rule in found.excluded.items())]
    local = given.seq_length / given.cp
    for inter, where in ((False, "within a node"), (True, "between nodes")):
        least = hiding_tokens(problem, cluster, inter, given.mask_type == "causal")
        lines.append(
            f"A ring {where} hides from {least:,.0f} tokens per rank; here {local:,.0f}, {local / least:.2f} x that."
        )
    if found.candidates:
        lines += ["", "Flags of the first: " + flags(found.candidates[0].config)]
    return "\n".join(lines)


def _run(given: argparse.Namespace) -> int:
    _positive(given)
    if given.calibrate:
        calibrate.save(calibrate.measured(given.device), given.calibrate)
        print(f"{given.calibrate}: {_assumed(calibrate.read_cluster(given.calibrate))[9:]}")
        return 0
    needed = {"--model or --hf-config": given.model or given.hf_config, "--seq-length": given.seq_length}
    missing = [flag for flag, value in (needed | {"--cluster": given.cluster}).items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not given; a plan needs all of them, --calibrate none.")
    if given.devices is not None and (given.documents or given.plot or given.policies):
        raise ValueError("--documents, --plot and --policies are for one attention layer; give --cp, not --devices.")
    model = named_model(given.model) if given.model else hf_model(given.hf_config)
    if given.devices is None and given.cp is None:
        raise ValueError("--cp is not given; give it for one attention layer, or --devices for a whole training.")
    if given.devices is None and (given.pp or given.global_batch or given.shell):
        raise ValueError("--pp, --global-batch and --shell belong to a whole training; give --devices.")
    names = [field.name for field in dataclasses.fields(Cluster)]
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    cluster = dataclasses.replace(calibrate.read_cluster(given.cluster), **changes)
    return _plan_layer(given, model, cluster) if given.devices is None else _plan_training(given, model, cluster)


def _plan_training(given: argparse.Namespace, model: ModelShape, cluster: Cluster) -> int:
    batch = given.global_batch or given.devices
    work = Work(model, given.seq_length, batch, given.micro_batch, given.mask_type)
    fixed = {name: getattr(given, name) for name in ("tp", "pp", "cp") if getattr(given, name) is not None}
    found, excluded = plans(work, given.devices, given.memory, cluster, fixed)
    if given.json:
        everything = {
            "basis": PREDICTION,
            "cluster": dataclasses.asdict(cluster),
            "plans": [report.record(plan, work) for plan in found],
            "excluded": excluded,
        }
        print(json.dumps(everything, indent=2))
    elif not found:
        print(f"mindspeed-cp plan: nothing fits: {excluded['everything']}", file=sys.stderr)
    elif given.shell:
        print("\n".join(report.shell(found[0])))
    else:
        lines = [f"{given.devices} devices, {batch} sequences of {given.seq_length} tokens: {PREDICTION}."]
        lines += [_assumed(cluster), "", *report.text(found, work), ""]
        lines += [f"Excluded: {what}: {rule}" for what, rule in excluded.items()]
        print("\n".join([*lines, "", "Flags of the first: " + report.megatron_flags(found[0])]))
    return 0 if found else 1


def _search(given: argparse.Namespace, model: ModelShape, cluster: Cluster) -> tuple[Problem, Found]:
    problem = _problem(given, model)
    setup = TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=given.seq_length,
        tensor_parallel_size=given.tp or 1,
    )
    return problem, search(given.cp, problem, setup, cluster, given.mask_type, given.policies)


def _plot(given: argparse.Namespace, model: ModelShape, cluster: Cluster) -> None:
    """From a sixteenth of the length to four times as much."""
    lengths = {given.seq_length * 2**power // 16 for power in range(0, 7)} - {0}
    found = {n: _search(argparse.Namespace(**{**vars(given), "seq_length": n}), model, cluster)[1] for n in lengths}
    plot(given.plot, found, f"{given.model or given.hf_config}, cp {given.cp}, tp {given.tp or 1}, {given.cluster}")


def _plan_layer(given: argparse.Namespace, model: ModelShape, cluster: Cluster) -> int:
    if given.plot:
        _plot(given, model, cluster)
    problem, found = _search(given, model, cluster)
    if given.json:
        found_json = {
            "basis": PREDICTION,
            "cluster": dataclasses.asdict(cluster),
            "candidates": [_record(candidate) for candidate in found.candidates],
            "excluded": found.excluded,
            "ring_hides_from_tokens": {
                where: hiding_tokens(problem, cluster, inter, given.mask_type == "causal")
                for where, inter in (("intra", False), ("inter", True))
            },
        }
        print(json.dumps(found_json, indent=2))
    else:
        print(_text(found, cluster, problem, given))
    return 0 if found.candidates else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns 0, 1 where no setting works, or 2 for a wrong flag."""
    given = parser().parse_args(arguments)
    try:
        return _run(given)
    except ValueError as error:
        print(f"mindspeed-cp plan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
