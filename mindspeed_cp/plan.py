"""Predict which setting of context parallelism is fastest for a model on a cluster, and why.

    python -m mindspeed_cp.plan --model llama2-70b --tp 8 --cp 4 --seq-length 131072 --cluster a100

One attention layer, forward and backward. Bytes are those of the engine itself; times are a prediction from peak rates.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from mindspeed_cp.config import MASK_TYPES, TrainingSetup
from mindspeed_cp.planner.cluster import CLUSTERS, Cluster
from mindspeed_cp.planner.models import MODELS, ModelShape, hf_model, named_model
from mindspeed_cp.planner.search import Candidate, Found, flags, hiding_tokens, search
from mindspeed_cp.planner.trace import Problem

PREDICTION = "prediction, not measured on this hardware"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mindspeed-cp plan", description=__doc__.partition("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    model.add_argument("--hf-config", help="a Hugging Face config.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--cp", type=int, required=True, help="context parallel size")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences")
    parser.add_argument("--mask-type", choices=[name for name in MASK_TYPES if name != "general"], default="causal")
    parser.add_argument("--policies", action="store_true", help="KV cache policies too; their memory is not predicted")
    parser.add_argument("--cluster", choices=CLUSTERS, required=True, help="preset that the flags below override")
    for field in dataclasses.fields(Cluster):
        kind = int if field.name == "devices_per_node" else float
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, help="bytes/s, FLOP/s, seconds or a share")
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    return parser


def _positive(given: argparse.Namespace) -> None:
    for name in ("tp", "cp", "seq_length", "micro_batch"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1.")


def _problem(given: argparse.Namespace, model: ModelShape) -> Problem:
    tp = given.tp
    if model.num_heads % tp:
        raise ValueError(f"--tp {tp} must divide the model's {model.num_heads} heads; choose a divisor of them.")
    if model.num_kv_heads % tp:
        raise ValueError(f"--tp {tp} must divide the model's {model.num_kv_heads} KV heads; choose a divisor of them.")
    sizes = model.num_heads // tp, model.num_kv_heads // tp, model.dk, model.dv
    return Problem(given.seq_length, *sizes, batch=given.micro_batch, stride=tp)


def reason(candidate: Candidate) -> str:
    """Why it takes as long as it does, in one sentence."""
    sent = f"sends {candidate.intra_bytes / 1e6:,.0f} MB within and {candidate.inter_bytes / 1e6:,.0f} MB between nodes"
    if candidate.exposed < 0.01 * candidate.seconds:
        return f"{sent}, hidden behind {candidate.compute * 1e3:,.1f} ms of attention"
    return f"{sent}, of which {candidate.exposed * 1e3:,.1f} ms do not hide"


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
    model = named_model(given.model) if given.model else hf_model(given.hf_config)
    names = [field.name for field in dataclasses.fields(Cluster)]
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    cluster, problem = dataclasses.replace(CLUSTERS[given.cluster], **changes), _problem(given, model)
    setup = TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=given.seq_length,
        tensor_parallel_size=given.tp,
    )
    found = search(given.cp, problem, setup, cluster, given.mask_type, given.policies)
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
