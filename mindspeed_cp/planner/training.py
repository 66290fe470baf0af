"""A whole training on a cluster: memory of the fullest device and time of a step, for every way to share it out.

The attention layer comes from the engine (search.py, memory.py), the rest from stages.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count, pairwise
from math import inf

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.layers import HALF, linear_layer, mean_saved, sparse_layer
from mindspeed_cp.planner.memory import AttentionBytes, kept_bytes, most_bytes
from mindspeed_cp.planner.models import ModelShape
from mindspeed_cp.planner.search import Candidate, Found, Policies, Timing, policies_beside, search, timed
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.stages import RECOMPUTES, Memory, Recompute, Step, kinds_of_stages, stage_memory, stage_step
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.derived import MaskType
from mindspeed_cp.settings.rules import heads_of_rank
from mindspeed_cp.settings.training_setup import TrainingSetup

MARGIN = 0.9  # of a device's memory: the rest is for what is not counted
SETTINGS = 4  # of context parallelism that are weighed where nothing fits


@dataclass(frozen=True)
class Plan:
    """One way to train."""

    split: Split
    attention: Candidate
    recompute: Recompute
    memory: Memory
    step: Step


@dataclass(frozen=True)
class Option:
    """One way to train of which it is not known yet whether it fits.

    Args:
        attention: the setting of context parallelism, None where none has been traced yet.
        is_bound: the times are lower bounds; a KV cache policy's are traced where they matter.
    """

    split: Split
    attention: Candidate | None
    recompute: Recompute
    step: Step
    is_bound: bool = False


@dataclass
class Search:
    """The ways to train, fastest first, each traced only when nothing that is not yet traced could be faster.

    Args:
        memory: bytes of a device.
        note: called with (how many splits are decided, how many there are).
    """

    work: Work
    memory: float
    cluster: Cluster
    excluded: dict[str, str] = field(default_factory=dict)
    note: Callable[[int, int], None] = lambda decided, of: None

    def fitting(self, some: Iterable[Split], wanted: Callable[[Candidate], bool] = lambda _: True) -> Iterator[Plan]:
        """Those that fit: of each split, recomputation and hierarchy of ranks the fastest setting, and the fastest that
        leaves a tenth of the memory, of equals the one that sends less. What attention needs and a policy saves is
        counted only where the rest leaves room for it.

        Args:
            wanted: asked for each setting before its memory is counted.
        """
        waiting: list[tuple[float, int, Option]] = []
        numbers, seen, decided = count(), set[tuple[object, ...]](), set[tuple[Split, Recompute]]()
        for option in self.bounds(some):
            heappush(waiting, (option.step.seconds, next(numbers), option))
        total = len(waiting)
        while waiting:
            _, number, option = heappop(waiting)
            if option.attention is None:
                decided.add((option.split, option.recompute))
                self.note(len(decided), total)
                for each in self.traced(option):
                    heappush(waiting, (each.step.seconds, next(numbers), each))
                continue
            split, recompute = option.split, option.recompute
            if not wanted(option.attention):
                continue
            if option.is_bound:
                if _memory(self.work, option, exact=False).total > self.memory:
                    continue
                candidate = timed(option.attention.config, problem_of(self.work, split), self.cluster)
                step = _step(self.work, split, candidate, recompute, self.cluster)
                heappush(waiting, (step.seconds, number, Option(split, candidate, recompute, step)))
                continue
            alike = split, recompute, option.attention.config.hierarchy
            if (*alike, False) not in seen and (plan := _plan(self.work, option)).memory.total <= self.memory:
                key = (*alike, is_tight(plan, self.memory))
                if key not in seen:
                    seen.add(key)
                    yield plan

    def bounds(self, some: Iterable[Split]) -> Iterator[Option]:
        """Every split with every recomputation that may fit, with the least time that attention can take."""
        for split in some:
            least = least_candidate(self.work, split, self.cluster)
            for recompute in RECOMPUTES if split.cp > 1 else RECOMPUTES[:2]:
                option = Option(
                    split, None, recompute, _step(self.work, split, least, recompute, self.cluster), is_bound=True
                )
                if _memory(self.work, option, exact=False).total <= self.memory:
                    yield option

    def traced(self, option: Option) -> Iterator[Option]:
        """The settings of context parallelism of one split."""
        split, recompute = option.split, option.recompute
        layer = attention(self.work, split, self.cluster)
        self._note_rules(split, layer)
        for candidate, is_bound in _with_policies(layer) if split.cp > 1 else [(layer.candidates[0], False)]:
            step = _step(self.work, split, candidate, recompute, self.cluster)
            yield Option(split, candidate, recompute, step, is_bound)

    def _note_rules(self, split: Split, layer: Found) -> None:
        for name, rule in layer.excluded.items() if split.cp > 1 else ():
            if rule not in self.excluded.values():
                self.excluded[f"{name} at cp {split.cp}, tp {split.tp}"] = rule
        if problem_of(self.work, split).layout_documents is None and self.work.documents is not None and split.cp > 1:
            self.excluded["--cp-batch-layout balanced"] = (
                "it goes by documents, which every row of a micro batch and every stage of a pipeline must share; use "
                "--micro-batch 1 and --pp 1."
            )


def plans(
    work: Work,
    devices: int,
    memory: float,
    cluster: Cluster,
    fixed: dict[str, int],
    *,
    most: int = 10,
    even_stages: bool = False,
    note: Callable[[int, int], None] = lambda decided, of: None,
) -> tuple[list[Plan], dict[str, str]]:
    """(the ``most`` fastest ways that leave a tenth of the memory free, fastest first, and behind them those that are
    faster or as fast and do not; of what is excluded the first rule).

    Args:
        memory: bytes of a device.
        fixed: sizes of Split that are given.
        even_stages: leave out pipelines whose stages differ, or are interleaved.
        note: called with how many ways of how many are decided.

    Raises:
        ValueError: no split of the devices exists.
    """
    excluded: dict[str, str] = {}
    some = list(splits(work, devices, cluster, fixed, excluded))
    if even_stages:
        some = [split for split in some if not split.last_layers and not split.ends and split.vpp == 1]
    roomy: list[Plan] = []
    tight: list[Plan] = []
    for plan in Search(work, memory, cluster, excluded, note).fitting(some):
        (tight if is_tight(plan, memory) else roomy).append(plan)
        if len(roomy) == most or (len(tight) >= 20 * most and roomy):
            break
    if not roomy and not tight and some:
        excluded["everything"] = _too_little(work, some, memory, cluster)
    by_time = [sorted(each, key=lambda plan: (plan.step.seconds, plan.memory.total)) for each in (roomy, tight)]
    return (by_time[0] + by_time[1][:most])[:most] if even_stages else by_time[0] + by_time[1][:most], excluded


def is_tight(plan: Plan, memory: float) -> bool:
    """Whether it leaves less than a tenth for what is not counted: the allocator's fragments, buffers of libraries."""
    return plan.memory.total > MARGIN * memory


def least_candidate(work: Work, split: Split, cluster: Cluster) -> Candidate:
    """What attention takes at least: its kernels with blocks as long as can be, and nothing that waits."""
    problem, model = problem_of(work, split), work.model
    area = _area(work) * problem.heads / split.cp
    tokens = work.seq_length
    forward, backward = (
        Timing(cluster.attention_seconds(2 * area * size, tokens, model.dk), 0.0)
        for size in (model.dk + model.dv, 3 * model.dk + 2 * model.dv)
    )
    return Candidate(ContextParallelConfig(), forward, backward, 0, 0)


@lru_cache(maxsize=64)
def _area(work: Work) -> float:
    """Pairs of query and key of a micro batch that attention computes in the mean layer."""
    rows, seq, (window, share) = work.documents, work.seq_length, work.model.limits
    every = rows if rows is not None and not isinstance(rows[0], int) else [rows or (0, seq)] * work.micro_batch
    total = 0.0
    for row in every:
        for start, stop in pairwise(row):
            length = stop - start
            whole = length * (length + 1) / 2 if work.mask_type == "causal" else length**2
            short = min(window, length)
            seen = short * length - short * (short - 1) / 2
            total += (1 - share) * whole + share * (seen if window else whole)
    return total * (1 - work.model.linear_share)


def _with_policies(layer: Found) -> Iterator[tuple[Candidate, bool]]:
    """(candidate, whether its time is a lower bound): a KV cache policy can save what backward waits, and no more."""
    for candidate in layer.candidates:
        yield candidate, False
        for policy in policies_beside(candidate.config.ulysses_chunks):
            if policy is not None:
                config = replace(candidate.config, kv_cache_policy=policy)
                yield replace(candidate, config=config, backward=replace(candidate.backward, exposed=0.0)), True


def _too_little(work: Work, some: list[Split], memory: float, cluster: Cluster) -> str:
    """What is missing where nothing fits: the least of the first settings of each way, fullest ways left out."""
    search = Search(work, inf, cluster)
    bounds = [(_memory(work, option, exact=False).total, option) for option in search.bounds(some)]
    best: Plan | None = None
    for least, option in sorted(bounds, key=lambda pair: pair[0]):
        if best is not None and least >= best.memory.total:
            break
        traced = [each for each in search.traced(option) if not each.is_bound][:SETTINGS]
        candidates = [_plan(work, each) for each in traced] + ([best] if best else [])
        best = min(candidates, key=lambda plan: plan.memory.total)
    assert best is not None, "there is a split"
    return (
        f"the least that is needed is {best.memory.total / 1e9:,.1f} GB of --memory {memory / 1e9:,.1f} GB, by "
        f"{sizes(best.split)}, recompute {best.recompute}; use more --devices or a shorter --seq-length."
    )


def _plan(work: Work, option: Option) -> Plan:
    assert option.attention is not None, "it was traced"
    return Plan(option.split, option.attention, option.recompute, _memory(work, option), option.step)


def attention(work: Work, split: Split, cluster: Cluster, policies: Policies = (None,)) -> Found:
    """The settings of context parallelism for one layer, timed, with these KV cache policies; those of one (tp, cp) are
    searched once.
    """
    model = work.model
    return _searched(split.cp, problem_of(work, split), model, split.tp, cluster, work.mask_type, policies)


def problem_of(work: Work, split: Split) -> Problem:
    """One layer's attention."""
    model = work.model
    heads = heads_of_rank(model.num_heads, model.num_kv_heads, split.tp)
    return Problem(
        work.seq_length,
        *heads,
        model.dk,
        model.dv,
        batch=work.micro_batch,
        cu_seqlens=work.documents,
        stride=split.tp,
        is_pipeline=split.pp > 1 and work.documents is not None,
        windowed=(model.window, model.windowed_share) if model.window else None,
        latent=(model.latent.rope, model.latent.kv_rank) if model.latent else None,
        linear=(linear_layer(model, split.tp), model.linear_share) if model.linear else None,
        layer=sparse_layer(model, split.tp) if model.indexer else None,
    )


@lru_cache(maxsize=256)
def _searched(
    cp: int, problem: Problem, model: ModelShape, tp: int, cluster: Cluster, mask_type: MaskType, policies: Policies
) -> Found:
    setup = TrainingSetup(
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        num_layers=model.num_layers,
        seq_length=problem.seq_len,
        tensor_parallel_size=tp,
    )
    return search(cp, problem, setup, cluster, mask_type, policies)


@lru_cache(maxsize=4096)
def _kept_bytes(config: ContextParallelConfig, problem: Problem) -> int:
    return kept_bytes(config, problem, 0)


def _least(problem: Problem, cp: int) -> AttentionBytes:
    """What every setting needs at least: query, out, and what travels of key and value, from forward to backward."""
    elements = problem.heads * (problem.dk + problem.dv) + problem.least_row_elements(cp)
    return AttentionBytes(problem.seq_len // cp * problem.batch * elements * HALF, 0, 0)


def planned(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Plan:
    """Memory and time of one way to train."""
    return _plan(work, Option(split, candidate, recompute, _step(work, split, candidate, recompute, cluster)))


def _memory(work: Work, option: Option, exact: bool = True) -> Memory:
    """The first stages of 1F1B have the most micro batches in flight, the last one the logits.

    Args:
        exact: count attention's memory; else a lower bound of it.
    """
    split = option.split
    problem = replace(problem_of(work, split), windowed=None, linear=None, layer=None)
    one = _least(problem, split.cp)
    if exact:
        assert option.attention is not None
        one = most_bytes(option.attention.config, problem)
    left = mean_saved(work, split, one.saved) if option.recompute == "none" else 0  # of all layers but the running one
    if option.recompute == "full, attention kept" and exact and option.attention:
        left = round(work.model.kept_share * _kept_bytes(option.attention.config, problem))
    stages = [stage_memory(work, split, option.recompute, number, one, left) for number in kinds_of_stages(work, split)]
    return max(stages, key=lambda stage: stage.total)


def _step(work: Work, split: Split, candidate: Candidate, recompute: Recompute, cluster: Cluster) -> Step:
    """Every stage as long as the slowest one; the last one has the output too."""
    steps = [stage_step(work, split, candidate, recompute, cluster, number) for number in kinds_of_stages(work, split)]
    return max(steps, key=lambda step: step.seconds)


def model_flops(work: Work, causal: bool = True) -> float:
    """FLOPs of a step that training needs, whatever is recomputed.

    Args:
        causal: count of causal attention what is computed; else all pairs, as NVIDIA's and Megatron's figures do.
    """
    model = work.model
    area = _area(work if causal else replace(work, mask_type="full")) / work.micro_batch
    products = model.active_parameters - (0 if model.tied else 1) * model.vocab * model.hidden
    pairs = 6 * area * model.num_layers * model.num_heads * (model.dk + model.dv)
    return work.global_batch * (6 * products * work.seq_length + pairs)


def utilization(work: Work, plan: Plan, cluster: Cluster, causal: bool = True) -> float:
    """Model FLOPs of a step over what the devices' peaks would do meanwhile."""
    devices = plan.split.stage * plan.split.pp
    return model_flops(work, causal) / (devices * cluster.flops * plan.step.seconds)


def tokens_per_second(work: Work, plan: Plan) -> float:
    """Of the whole cluster."""
    return work.global_batch * work.seq_length / plan.step.seconds
