"""What is trained, and all ways to split the devices among the kinds of parallelism."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.documents import Boundaries
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.settings.fields import MaskType
from mindspeed_cp.settings.rules import heads_of_rank, require_even_tokens

FEWEST_TOKENS = 256  # of a sequence on a rank; with fewer, kernels are too inefficient to be worth searching


@dataclass(frozen=True)
class Work:
    """What is trained.

    Args:
        seq_length: tokens of a sequence. global_batch, micro_batch: sequences.
        documents: document boundaries of a row, or of every row of a micro batch.
    """

    model: ModelShape
    seq_length: int
    global_batch: int
    micro_batch: int = 1
    mask_type: MaskType = "causal"
    documents: Boundaries | tuple[Boundaries, ...] | None = None


@dataclass(frozen=True)
class Split:
    """Sizes of tensor, pipeline, context and data parallelism.

    Args:
        ep, etp: size of expert parallelism, and of tensor parallelism within an expert; 0 if there are no experts.
        last_layers: number of layers in the last pipeline stage if it is shorter than the others, else 0.
        vpp: number of virtual stages per stage; 1 if the pipeline is not interleaved.
        ends: whether embedding and output count as one layer each, to make the stages equal.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int = 0
    etp: int = 0
    last_layers: int = 0
    vpp: int = 1
    ends: bool = False

    @property
    def stage(self) -> int:
        """Number of devices of a pipeline stage: consecutive ranks, which expert parallelism splits differently."""
        return self.tp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Size of expert data parallelism, the number of copies of an expert."""
        return self.stage // (self.ep * self.etp)


def sizes(split: Split) -> str:
    values = {name: value for name, value in vars(split).items() if value and (name != "vpp" or value > 1)}
    ends = ", embedding and output as layers" if values.pop("ends", False) else ""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items()) + ends


def splits(
    work: Work, devices: int, cluster: Cluster, fixed: dict[str, int], excluded: dict[str, str]
) -> Iterator[Split]:
    """Every split that the model and the batch permit; ``excluded`` gets the first rule that each other one breaks."""
    model, some = work.model, False
    for tp in _chosen(fixed.get("tp"), devices):
        rule = _rule_of_tp(model, tp, None if "tp" in fixed else cluster)
        if rule:
            excluded.setdefault(f"tp {tp}", rule)
            continue
        for pp in _chosen(fixed.get("pp"), devices // tp):
            shapes = list(_pipelines(model.num_layers, pp, fixed.get("vpp")))
            if not shapes:
                excluded.setdefault(f"pp {pp}", f"{model.num_layers} layers must be divisible by it, or nearly so")
                continue
            for cp in _chosen(fixed.get("cp"), devices // tp // pp):
                if "cp" not in fixed and work.seq_length < cp * FEWEST_TOKENS and cp > 1:
                    excluded.setdefault(
                        f"cp {cp}", f"a rank would have fewer than {FEWEST_TOKENS} tokens; --cp plans it"
                    )
                    continue
                rule = _broken(require_even_tokens, work.seq_length, cp, tp) if tp > 1 else ""
                if rule:
                    excluded.setdefault(f"tp {tp} with some cp", rule)
                    continue
                dp = devices // tp // pp // cp
                if work.global_batch % (dp * work.micro_batch):
                    samples = f"dp {dp} x --micro-batch {work.micro_batch}"
                    rule = f"--global-batch {work.global_batch} is not a multiple of {samples}"
                    excluded.setdefault(f"dp {dp}", rule)
                    continue
                # Interleaving needs a number of micro batches that pp divides.
                even = work.global_batch // (dp * work.micro_batch) % pp == 0
                for ep, etp in _expert_sizes(model, tp, tp * cp * dp, fixed, excluded):
                    for last, vpp, ends in shapes if even else [shape for shape in shapes if shape[1] == 1]:
                        some = True
                        yield Split(tp, pp, cp, dp, ep, etp, last, vpp, ends)
    if not some:
        rules = "; ".join(f"{what}: {rule}" for what, rule in excluded.items())
        rules = rules or ", ".join(f"--{name} {size}" for name, size in fixed.items()) + " must divide them"
        raise ValueError(f"--devices {devices} cannot be split for this model and batch ({rules}); change one of them.")


def _pipelines(layers: int, pp: int, vpp: int | None) -> Iterator[tuple[int, int, bool]]:
    """(layers of a shorter last stage or 0, virtual stages, whether embedding and output count as layers)."""
    last = layers - (pp - 1) * -(-layers // pp)
    if last >= 1 and vpp in (None, 1):
        yield last if layers % pp else 0, 1, False
    ends = layers % pp > 0 and (layers + 2) % pp == 0
    if pp == 1 or (layers % pp and not ends):
        return
    a_stage = (layers + 2 * ends) // pp
    for parts in _chosen(vpp, a_stage):
        if parts > 1 or ends:
            yield 0, parts, ends


def _rule_of_tp(model: ModelShape, tp: int, cluster: Cluster | None) -> str:
    """The first rule that excludes ``tp`` tensor-parallel ranks, or ""; they must be within a node of the cluster."""
    if cluster is not None and tp > cluster.devices_per_node:
        return f"tensor parallelism would leave the node of {cluster.devices_per_node}"
    for width in model.split_widths:
        if width % tp:
            return f"an MLP of width {width} must be divisible by it"
    linear = model.linear
    if linear and (linear.keys % tp or linear.values % tp):
        return f"{linear.keys} key and {linear.values} value heads of layers with a state must be divisible by it"
    return _broken(heads_of_rank, model.num_heads, model.num_kv_heads, tp)


def _broken(rule: Callable[..., object], *values: int) -> str:
    """The error message of a rule for these values, or ""."""
    try:
        rule(*values)
    except ValueError as error:
        return str(error)
    return ""


def _chosen(given: int | None, total: int) -> list[int]:
    numbers = [number for number in range(1, total + 1) if total % number == 0]
    return numbers if given is None else [given] if given in numbers else []


def _expert_sizes(
    model: ModelShape, tp: int, stage: int, fixed: dict[str, int], excluded: dict[str, str]
) -> Iterator[tuple[int, int]]:
    """(expert parallel size, expert tensor parallel size) by Megatron's rules; the latter is 1 or tp."""
    experts = model.experts
    if experts is None:
        given = [f"{name} {fixed[name]}" for name in ("ep", "etp") if fixed.get(name, 1) > 1]
        excluded.update(dict.fromkeys(given, "the model has no experts"))
        if not given:
            yield 0, 0
        return
    for etp in [fixed["etp"]] if "etp" in fixed else sorted({1, tp}):
        if experts.ffn % etp:
            excluded.setdefault(f"etp {etp}", f"experts of width {experts.ffn} must be divisible by it")
            continue
        if experts.bias and etp > 1:
            excluded.setdefault(f"etp {etp}", "biases in experts, which --disable-bias-linear leaves out, need etp 1")
            continue
        for ep in [fixed["ep"]] if "ep" in fixed else _chosen(None, stage // etp):
            if experts.num % ep:
                excluded.setdefault(f"ep {ep}", f"{experts.num} experts must be divisible by it")
            elif stage % (ep * etp):
                excluded.setdefault(f"ep {ep} x etp {etp}", f"{stage} devices of a stage must be divisible by it")
            else:
                yield ep, etp
