"""The planner's report for a whole training: a table, the reason, the flags, and shell variables."""

from mindspeed_cp.arguments.declared import variables_of
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.search import flags
from mindspeed_cp.planner.split import Work, sizes
from mindspeed_cp.planner.timing import Candidate
from mindspeed_cp.planner.training import MARGIN, Plan, is_tight, tokens_per_second, utilization

SHOWN = 5


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
