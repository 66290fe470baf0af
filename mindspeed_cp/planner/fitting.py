"""Training plans that fit a cluster, fastest first: a best-first search over splits, recomputation and settings.

An option that is not traced yet has a lower bound of its time, and is traced once no known option is faster.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from math import inf

from mindspeed_cp.planner.cluster import Cluster
from mindspeed_cp.planner.search import allowed
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.stages import RECOMPUTES, Recompute, Step
from mindspeed_cp.planner.timing import Candidate, Timing, heads_seconds, preference, timed
from mindspeed_cp.planner.trace import Problem
from mindspeed_cp.planner.training import (
    MARGIN,
    Plan,
    area,
    attention,
    is_tight,
    least_memory,
    planned,
    problem_of,
    setup_of,
    step_of,
)
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.fields import MaskType
from mindspeed_cp.settings.training_setup import TrainingSetup

SETTINGS = 4  # number of settings of context parallelism whose memory is counted if nothing fits
Note = Callable[[int, int], None]
Family = tuple[ContextParallelConfig, ...]
Kind = Callable[[Split, Recompute, ContextParallelConfig | None], Hashable | None]


def by_split(split: Split, recompute: Recompute, config: ContextParallelConfig | None) -> Hashable:
    """Group options by their sizes, ignoring recomputation, virtual stages and setting."""
    return split.tp, split.pp, split.cp, split.dp, split.ep, split.etp


def by_setting(split: Split, recompute: Recompute, config: ContextParallelConfig | None) -> Hashable | None:
    """Group options by split, recomputation and hierarchy of ranks."""
    return (split, recompute, config.hierarchy) if config else None


@dataclass(frozen=True)
class Option:
    """One way to train, of which it is not yet known whether it fits.

    Args:
        attention: the setting of context parallelism, None if not chosen yet.
        is_bound: whether the times are lower bounds.
        family: all settings with the same computation; the search begins with the first.
        before: seconds of the setting that led to this one.
    """

    split: Split
    attention: Candidate | None
    recompute: Recompute
    step: Step
    is_bound: bool = False
    family: Family = ()
    before: float = inf

    @property
    def config(self) -> ContextParallelConfig | None:
        return self.attention.config if self.attention else None


@dataclass
class Search:
    """Best-first search for training plans.

    Args:
        memory: bytes of a device.
        kind: key that groups similar options, of which only the fastest is found; it is None before a setting is
            chosen if the group depends on the setting.
        note: called with (number of decided splits, number of splits).
    """

    work: Work
    memory: float
    cluster: Cluster
    kind: Kind = by_split
    excluded: dict[str, str] = field(default_factory=dict)
    note: Note = lambda decided, of: None

    def fitting(self, some: Iterable[Split]) -> Iterator[Plan]:
        """Yield the plans that fit: of each kind the fastest, and the fastest that leaves a tenth of the memory. Among
        equals, plans without a KV cache policy come first, then those with the fewest extras, then the fewest bytes.
        """
        waiting: list[tuple[float, tuple[float, ...], int, Option]] = []
        numbers, decided = count(), 0
        done: dict[Hashable, bool] = {}  # kind -> whether its plan leaves a tenth of the memory

        def push(option: Option) -> None:
            second = preference(option.attention)[1:] if option.attention and not option.is_bound else ()
            heappush(waiting, (float(f"{option.step.seconds:.9g}"), second, next(numbers), option))

        for option in self.bounds(some):
            push(option)
        total = len(waiting)
        while waiting:
            option = heappop(waiting)[-1]
            decided += option.attention is None
            self.note(decided, total)
            kind = self.kind(option.split, option.recompute, option.config)
            if kind in done and (done[kind] or not self._may_fit(option, MARGIN)):
                continue
            if option.attention is None or option.is_bound:
                for each in self._settings(option) if option.attention is None else self._traced(option):
                    push(each)
                continue
            plan = planned(self.work, option.split, option.attention, option.recompute, self.cluster)
            roomy = not is_tight(plan, self.memory)
            if plan.memory.total <= self.memory and (roomy or kind not in done):
                done[kind] = roomy
                yield plan

    def bounds(self, some: Iterable[Split]) -> Iterator[Option]:
        """Yield every split with every recomputation that may fit, with a lower bound of attention's time."""
        for split in some:
            least = _least(self.work, split, self.cluster)
            for recompute in RECOMPUTES if split.cp > 1 else RECOMPUTES[:2]:
                step = step_of(self.work, split, least, recompute, self.cluster)
                option = Option(split, None, recompute, step, is_bound=True)
                if self._may_fit(option):
                    yield option

    def _may_fit(self, option: Option, share: float = 1.0) -> bool:
        degree = option.config.hierarchy[0] if option.config else 1
        return least_memory(self.work, option.split, option.recompute, degree) <= share * self.memory

    def _settings(self, option: Option) -> Iterator[Option]:
        """Yield the first setting of each family for one split, with lower bounds of their times."""
        split = option.split
        problem = problem_of(self.work, split)
        families, excluded = _families(split.cp, problem, setup_of(self.work, split), self.cluster, self.work.mask_type)
        self._note_rules(split, excluded)
        for family in families:
            # Settings with the most groups of heads wait the least.
            waits = min(heads_seconds(config, problem, self.cluster) for config in family)
            least = _least(self.work, split, self.cluster, family[0])
            forward, backward = (replace(each, exposed=waits, heads=waits) for each in (least.forward, least.backward))
            setting = self._option(option, Candidate(family[0], forward, backward, 0, 0), family, inf)
            if self._may_fit(setting):
                yield setting

    def _traced(self, option: Option) -> Iterator[Option]:
        """Yield a setting with its time, and the settings that it leads to, which may hide more communication."""
        assert option.config is not None, "a setting was chosen"
        problem = problem_of(self.work, option.split)
        try:
            found = timed(option.config, problem, self.cluster)
        except ValueError:  # a number of groups may not fit the heads
            return
        yield replace(self._option(option, found), is_bound=False)
        if found.seconds >= option.before:
            return
        for config in option.family:
            if is_next(found, config, option.family[0]):
                is_for_memory = config.ring_size == 1 and config.kv_cache_policy is not None
                least = found if is_for_memory else _hidden(found, heads_seconds(config, problem, self.cluster))
                yield self._option(option, replace(least, config=config), option.family, found.seconds)

    def _option(self, option: Option, candidate: Candidate, family: Family = (), before: float = inf) -> Option:
        step = step_of(self.work, option.split, candidate, option.recompute, self.cluster)
        return replace(option, attention=candidate, step=step, is_bound=True, family=family, before=before)

    def _note_rules(self, split: Split, excluded: dict[str, str]) -> None:
        for name, rule in excluded.items() if split.cp > 1 else ():
            if rule not in self.excluded.values():
                self.excluded[f"{name} at cp {split.cp}, tp {split.tp}"] = rule
        if problem_of(self.work, split).layout_documents is None and self.work.documents is not None and split.cp > 1:
            self.excluded["--cp-batch-layout balanced"] = (
                "it depends on documents, which every row of a micro batch and every stage of a pipeline must share; "
                "use --micro-batch 1 and --pp 1."
            )


@lru_cache(maxsize=256)
def _families(
    cp: int, problem: Problem, setup: TrainingSetup, cluster: Cluster, mask_type: MaskType
) -> tuple[tuple[Family, ...], dict[str, str]]:
    """Return (families of settings with the same algorithm, degree, layout and latent exchange, each beginning with the
    setting that sends least and has no extras; for every algorithm without a setting the first rule it breaks).
    """
    first_rule: dict[str, str] = {}
    families: dict[Hashable, list[ContextParallelConfig]] = {}
    for config in allowed(cp, problem, setup, cluster, mask_type, first_rule):
        key = config.algorithm, config.hierarchy[0], config.batch_layout, config.mla_exchange
        families.setdefault(key, []).append(config)
    working = {config.algorithm for family in families.values() for config in family}
    wanted = "ring" if mask_type == "full" and problem.cu_seqlens is None else "direct"
    for family in families.values():
        family.sort(key=lambda each: (_extras(each), each.window_size, each.kv_exchange != wanted))
    some = list(families.values())[: 1 if cp == 1 else None]
    return tuple(map(tuple, some)), {name: rule for name, rule in first_rule.items() if name not in working}


def _extras(config: ContextParallelConfig) -> tuple[object, ...]:
    return config.kv_cache_policy is not None, config.ulysses_chunks, config.in_flight


def _way(config: ContextParallelConfig) -> tuple[object, ...]:
    """How keys and values are exchanged."""
    return config.window_size, config.kv_exchange, config.in_flight


def is_next(found: Candidate, config: ContextParallelConfig, first: ContextParallelConfig) -> bool:
    """Whether the search goes from ``found`` to ``config``, which computes the same and may wait less: by another
    exchange of keys and values if ``found`` is the first of its family, by a KV cache policy, or by twice as many
    groups of heads. Without a ring, a policy saves memory instead.
    """
    own = replace(found.config, linear_exchange=first.linear_exchange)  # it depends on the other settings
    policy = config.kv_cache_policy
    if own.kv_cache_policy is not None:
        return False
    if config.ulysses_chunks > 1:
        alike = _way(config) == _way(own) and policy is None
        return found.waits_for_heads and alike and config.ulysses_chunks == 2 * own.ulysses_chunks
    if own.ulysses_chunks > 1 or config == own:
        return False
    if policy is None:
        return found.waits_for_rows and own == first
    return (found.waits_for_rows or own.ring_size == 1) and _way(config) == _way(own)


def _hidden(found: Candidate, heads: float) -> Candidate:
    """Lower bound for settings that compute the same as ``found``: they wait at least for Ulysses' exchange."""
    forward, backward = (
        replace(each, exposed=min(heads, each.exposed), heads=min(heads, each.heads))
        for each in (found.forward, found.backward)
    )
    return replace(found, forward=forward, backward=backward)


def _least(work: Work, split: Split, cluster: Cluster, config: ContextParallelConfig | None = None) -> Candidate:
    """Lower bound of attention's time: kernels with the longest possible blocks, and no waiting."""
    problem, model = problem_of(work, split), work.model
    pairs = area(work) * problem.heads / split.cp
    # Blocks are at most as long as a ring rank's part; documents may load ranks unevenly.
    ranks = 1 if config is None or work.documents is not None else config.ring_size
    tokens = -(-work.seq_length // ranks) + 1
    forward, backward = (
        Timing(cluster.attention_seconds(2 * pairs * size, tokens, model.dk), 0.0)
        for size in (model.dk + model.dv, 3 * model.dk + 2 * model.dv)
    )
    return Candidate(config or ContextParallelConfig(), forward, backward, 0, 0)


def plans(
    work: Work,
    devices: int,
    memory: float,
    cluster: Cluster,
    fixed: dict[str, int],
    *,
    most: int = 10,
    even_stages: bool = False,
    note: Note = lambda decided, of: None,
) -> tuple[list[Plan], dict[str, str]]:
    """Return (plans of the ``most`` fastest splits that leave a tenth of the memory free, fastest first, then plans
    that are at least as fast but leave less; excluded item -> first rule it breaks). If only one split is possible, its
    settings are listed instead.

    Args:
        memory: bytes of a device.
        fixed: given sizes of Split.
        even_stages: leave out pipelines whose stages differ, or are interleaved.
        note: called with (number of decided splits, number of splits).

    Raises:
        ValueError: no split of the devices exists.
    """
    excluded: dict[str, str] = {}
    some = list(splits(work, devices, cluster, fixed, excluded))
    if even_stages:
        some = [split for split in some if not split.last_layers and not split.ends and split.vpp == 1]
    kind = by_split if len({by_split(split, "none", None) for split in some}) > 1 else by_setting
    roomy: list[Plan] = []
    tight: list[Plan] = []
    for plan in Search(work, memory, cluster, kind, excluded, note).fitting(some):
        (tight if is_tight(plan, memory) else roomy).append(plan)
        if len(roomy) == most or (len(tight) >= 20 * most and roomy):
            break
    if not roomy and not tight and some:
        excluded["everything"] = _too_little(work, some, memory, cluster)
    for each in (roomy, tight):
        each.sort(key=lambda plan: (plan.step.seconds, plan.memory.total))
    found = roomy + tight[:most]
    return found[:most] if even_stages else found, excluded


def _too_little(work: Work, some: list[Split], memory: float, cluster: Cluster) -> str:
    """Message if nothing fits: the smallest memory among the first settings of each option, smallest bounds first."""
    search = Search(work, inf, cluster)
    bounds = [(least_memory(work, each.split, each.recompute), each) for each in search.bounds(some)]
    best: Plan | None = None
    for least, option in sorted(bounds, key=lambda pair: pair[0]):
        if best is not None and least >= best.memory.total:
            break
        settings = attention(work, option.split, cluster).candidates[: SETTINGS if option.split.cp > 1 else 1]
        candidates = [planned(work, option.split, each, option.recompute, cluster) for each in settings]
        best = min([*candidates, *([best] if best else [])], key=lambda plan: plan.memory.total)
    assert best is not None, "there is a split"
    return (
        f"the least that is needed is {best.memory.total / 1e9:,.1f} GB of --memory {memory / 1e9:,.1f} GB, by "
        f"{sizes(best.split)}, recompute {best.recompute}; use more --devices or a shorter --seq-length."
    )
