"""What is trained, and every way to share the devices out among the kinds of parallelism."""

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_cp.config import MaskType, heads_of_rank
from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.models import ModelShape


@dataclass(frozen=True)
class Work:
    """What is trained.

    Args:
        seq_length: tokens of a sequence. global_batch, micro_batch: sequences.
    """

    model: ModelShape
    seq_length: int
    global_batch: int
    micro_batch: int = 1
    mask_type: MaskType = "causal"


@dataclass(frozen=True)
class Split:
    """Sizes of tensor, pipeline, context and data parallelism."""

    tp: int
    pp: int
    cp: int
    dp: int


def sizes(split: Split) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(split).items())


def splits(
    work: Work, devices: int, cluster: Cluster, fixed: dict[str, int], excluded: dict[str, str]
) -> Iterator[Split]:
    """Every split of the devices that the model and the batch allow; of what they do not, the first rule."""
    model, some = work.model, False
    for tp in _chosen(fixed.get("tp"), devices):
        if tp > cluster.devices_per_node and "tp" not in fixed:
            excluded.setdefault(f"tp {tp}", f"tensor parallelism would leave the node of {cluster.devices_per_node}")
            continue
        try:
            heads_of_rank(model.num_heads, model.num_kv_heads, tp)
        except ValueError as error:
            excluded.setdefault(f"tp {tp}", str(error))
            continue
        for pp in _chosen(fixed.get("pp"), devices // tp):
            if model.num_layers % pp:
                excluded.setdefault(f"pp {pp}", f"{model.num_layers} layers must be divisible by it")
                continue
            for cp in _chosen(fixed.get("cp"), devices // tp // pp):
                dp = devices // tp // pp // cp
                if work.global_batch % (dp * work.micro_batch):
                    samples = f"dp {dp} x --micro-batch {work.micro_batch}"
                    excluded.setdefault(f"dp {dp}", f"--global-batch {work.global_batch} is no multiple of {samples}")
                    continue
                some = True
                yield Split(tp, pp, cp, dp)
    if not some:
        rules = "; ".join(f"{what}: {rule}" for what, rule in excluded.items())
        rules = rules or ", ".join(f"--{name} {size}" for name, size in fixed.items()) + " must divide them"
        raise ValueError(f"--devices {devices} cannot be split for this model and batch ({rules}); change one of them.")


def _chosen(given: int | None, total: int) -> list[int]:
    numbers = [number for number in range(1, total + 1) if total % number == 0]
    return numbers if given is None else [given] if given in numbers else []
