"""Every rule and every fallback of context parallelism, once.

``ContextParallelConfig`` holds what the algorithms need and nothing of the model; ``TrainingSetup`` holds what a launch
script says about the model and the machine. ``resolve(config, setup)`` checks one against the other and applies the
fallbacks. Errors name the flag, the value, the rule and a value that works.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

from mindspeed_cp.settings.algorithms import ALGORITHMS, Algorithm, Hierarchy, names_with
from mindspeed_cp.settings.notices import warn_rank0
from mindspeed_cp.settings.rules import divisors, listed, require, require_even_tokens

MaskType = Literal["causal", "full", "general"]
KVCachePolicy = Literal["full", "half"]
KVExchange = Literal["ring", "direct", "mesh", "auto"]
Topology = Literal["auto", "mesh", "switch", "nodes"]
P2P = Literal["auto", "batch", "isend"]
BatchLayout = Literal["auto", "contiguous", "zigzag", "document_zigzag", "balanced"]

MASK_TYPES: tuple[str, ...] = get_args(MaskType)
KV_CACHE_POLICIES = (None, *get_args(KVCachePolicy))
KV_EXCHANGES: tuple[str, ...] = get_args(KVExchange)
TOPOLOGIES: tuple[str, ...] = get_args(Topology)
P2P_KINDS: tuple[str, ...] = get_args(P2P)
BATCH_LAYOUTS: tuple[str, ...] = get_args(BatchLayout)


@dataclass(frozen=True, kw_only=True)
class ContextParallelConfig:
    """What one context-parallel group computes and how; raises ValueError for every combination that cannot work.

    Args:
        context_parallel_size: ranks over which the sequence is split (--context-parallel-size).
        algorithm: a key of ALGORITHMS (--context-parallel-algo).
        ulysses_degree: ranks that split the heads, Hybrid only (--ulysses-degree-in-cp).
        window_size: inner window of Double Ring; 1 is the plain ring (--cp-window-size).
        attention_mask_type: what a layer sees that brings no mask of its own (--cp-attention-mask-type): "causal";
            "full", every token; "general", the mask or the documents that come with the batch, else causal.
        kv_cache_policy: None, "full" or "half" (--context-parallel-kv-cache-policy).
        kv_cache_interval: layers without the policy between two with it (--context-parallel-cache-interval).
        allgather_kv: Ulysses gathers the one KV head instead of replicating it (--use-ulysses-allgather-kv).
        send_recv_overlap: post transfers before the block that hides them (--use-cp-send-recv-overlap).
        alltoall: False replaces all-to-all by all-gather and slicing (MindFormers' enable_alltoall).
        kv_exchange: "ring" forwards whole shards, "direct" sends each peer the rows its mask needs, "mesh" trades a
            slice of every shard in each step, "auto" takes mesh where ranks form one, else what sends less for the
            batch (--cp-kv-exchange).
        in_flight: steps of the exchange that may be under way at once, where nothing is forwarded; "auto" by topology
            (--cp-in-flight).
        topology: how ring ranks are linked: "mesh", each pair by a link of its own; "switch", any one peer at full
            rate; "nodes", several servers; "auto" asks the ranks: nodes where they are on several hosts, else mesh on
            NPUs and switch elsewhere (--cp-topology). What is "auto" reads it.
        ulysses_chunks: groups of heads that Ulysses exchanges and computes one after the other (--cp-ulysses-chunks).
        p2p: how messages between single ranks are posted (--cp-p2p): "batch", all of one step together; "isend", one
            after the other; "auto", as a batch but where HCCL forbids it, beside virtual pipeline stages.
        batch_layout: which tokens a rank holds (--cp-batch-layout): "auto" is what the algorithm likes, "contiguous",
            "zigzag" over the whole row as Megatron cuts it, "document_zigzag" over every document on its own,
            "balanced" by the attention area of packed documents.
        keep_attention: recomputation takes attention from the forward pass (--cp-keep-attention). Megatron's
            checkpoints read it; with torch's, pass ``kept`` to ``context_parallel_attention``.
        log: training reports bytes, waits and imbalance of context parallelism (--cp-log).
    """

    context_parallel_size: int = 1
    algorithm: str = "ulysses_cp_algo"
    ulysses_degree: int | None = None
    window_size: int = 1
    attention_mask_type: MaskType = "causal"
    kv_cache_policy: KVCachePolicy | None = None
    kv_cache_interval: int = 0
    allgather_kv: bool = False
    send_recv_overlap: bool = False
    alltoall: bool = True
    kv_exchange: KVExchange = "ring"
    in_flight: int | Literal["auto"] = 1
    topology: Topology = "auto"
    ulysses_chunks: int = 1
    p2p: P2P = "auto"
    batch_layout: BatchLayout = "auto"
    keep_attention: bool = False
    log: bool = False

    def __post_init__(self) -> None:
        cp = self.context_parallel_size
        require(
            isinstance(cp, int) and cp >= 1,
            f"--context-parallel-size {cp} must be a whole number of at least 1; 1 switches it off.",
        )
        require(
            self.algorithm in ALGORITHMS,
            f"--context-parallel-algo {self.algorithm} is not known; choose one of {', '.join(ALGORITHMS)}.",
        )
        require(
            self.attention_mask_type in MASK_TYPES,
            f"--cp-attention-mask-type {self.attention_mask_type} is not known; choose one of {', '.join(MASK_TYPES)}.",
        )
        self._check_degree()
        self._check_window()
        self._check_kv_cache()
        self._check_exchange()
        require(
            self.batch_layout in BATCH_LAYOUTS,
            f"--cp-batch-layout {self.batch_layout} is not known; choose one of {', '.join(BATCH_LAYOUTS)}.",
        )
        require(
            not self.keep_attention or cp > 1,
            "--cp-keep-attention needs --context-parallel-size above 1; leave it out or use --context-parallel-size 2 "
            "or more.",
        )
        for notice in self.ignored_settings():
            warn_rank0(notice)

    @property
    def row(self) -> Algorithm:
        """The algorithm's row of the table."""
        return ALGORITHMS[self.algorithm]

    def _check_degree(self) -> None:
        cp, degree, name = self.context_parallel_size, self.ulysses_degree, self.algorithm
        if not self.row.takes_degree:
            return
        choices = divisors(cp, 2, cp - 1)
        way_out = (
            f"choose {choices}"
            if choices
            else (
                f"no number does for --context-parallel-size {cp}: take a size that is not prime, such as 4, or "
                f"--context-parallel-algo {names_with(takes_degree=False)}"
            )
        )
        require(
            degree is not None,
            f"--ulysses-degree-in-cp is not given, and --context-parallel-algo {name} needs it; {way_out}.",
        )
        assert degree is not None
        require(
            isinstance(degree, int) and 1 < degree < cp,
            f"--ulysses-degree-in-cp {degree} must lie between 1 and --context-parallel-size {cp}, both excluded; "
            f"{way_out}.",
        )
        require(
            cp % degree == 0, f"--ulysses-degree-in-cp {degree} must divide --context-parallel-size {cp}; {way_out}."
        )

    def _check_window(self) -> None:
        window = self.window_size
        require(
            isinstance(window, int) and window >= 1,
            f"--cp-window-size {window} must be a whole number of at least 1; 1 is the plain ring.",
        )
        if window == 1 or not self.row.takes_window:
            return
        ring = self.context_parallel_size // (self.ulysses_degree or 1 if self.row.takes_degree else 1)
        require(
            window < ring and ring % window == 0,
            f"--cp-window-size {window} must be smaller than the ring size {ring} and divide it; "
            f"choose {divisors(ring, 1, max(ring - 1, 1))}.",
        )

    def _check_kv_cache(self) -> None:
        policy, interval = self.kv_cache_policy, self.kv_cache_interval
        require(
            policy in KV_CACHE_POLICIES,
            f"--context-parallel-kv-cache-policy {policy} is not known; choose full or half, or leave it out.",
        )
        require(
            policy is None or self.context_parallel_size > 1,
            f"--context-parallel-kv-cache-policy {policy} needs --context-parallel-size above 1; "
            "leave it out or use --context-parallel-size 2 or more.",
        )
        require(
            isinstance(interval, int) and interval >= 0,
            f"--context-parallel-cache-interval {interval} must be 0 or more; 0 applies the policy to every layer.",
        )
        require(
            interval == 0 or policy is not None,
            f"--context-parallel-cache-interval {interval} needs --context-parallel-kv-cache-policy; "
            "add --context-parallel-kv-cache-policy full or half.",
        )

    def _check_exchange(self) -> None:
        require(
            self.kv_exchange in KV_EXCHANGES,
            f"--cp-kv-exchange {self.kv_exchange} is not known; choose one of {', '.join(KV_EXCHANGES)}.",
        )
        require(self.p2p in P2P_KINDS, f"--cp-p2p {self.p2p} is not known; choose one of {', '.join(P2P_KINDS)}.")
        exchange = f"--cp-kv-exchange {self.kv_exchange}"
        if self.kv_exchange in ("direct", "mesh"):
            require(
                self.row.exchange == "ring",
                f"{exchange} needs a ring-type algorithm, not --context-parallel-algo {self.algorithm}; "
                f"choose {names_with(exchange='ring')}, or --cp-kv-exchange ring.",
            )
            require(
                self.window_size == 1,
                f"{exchange} forwards nothing, so --cp-window-size {self.window_size} has no meaning; "
                "use --cp-window-size 1, or --cp-kv-exchange ring.",
            )
        require(
            self.in_flight == "auto" or (_is_whole(self.in_flight) and self.in_flight >= 1),
            f"--cp-in-flight {self.in_flight} must be auto or a whole number of at least 1; 1 is one step at a time.",
        )
        require(
            self.topology in TOPOLOGIES,
            f"--cp-topology {self.topology} is not known; choose one of {', '.join(TOPOLOGIES)}.",
        )
        require(
            _is_whole(self.ulysses_chunks) and self.ulysses_chunks >= 1,
            f"--cp-ulysses-chunks {self.ulysses_chunks} must be a whole number of at least 1; 1 exchanges all heads at "
            "once.",
        )
        require(
            not self.allgather_kv or (self.row.splits_heads and self.row.exchange is None),
            f"--use-ulysses-allgather-kv needs --context-parallel-algo {names_with(splits_heads=True, exchange=None)}, "
            f"not {self.algorithm}; leave it out or change the algorithm.",
        )

    def ignored_settings(self) -> list[str]:
        """Messages about settings that the chosen algorithm does not read; they are warnings, never silence."""
        row, algorithm = self.row, f"--context-parallel-algo {self.algorithm}"
        ignored = {
            f"--cp-window-size {self.window_size} is ignored: {algorithm} has no ring windows.": self.window_size > 1
            and not row.takes_window,
            f"--ulysses-degree-in-cp {self.ulysses_degree} is ignored: only {names_with(takes_degree=True)} reads it, "
            f"not {algorithm}.": self.ulysses_degree is not None and not row.takes_degree,
            f"--use-cp-send-recv-overlap is ignored: {algorithm} sends nothing around a ring.": self.send_recv_overlap
            and row.exchange is None,
            f"--cp-p2p {self.p2p} is ignored: {algorithm} sends no messages between single ranks.": self.p2p != "auto"
            and row.exchange != "ring",
            f"--cp-p2p {self.p2p} is ignored: the mesh exchange sends no messages between single ranks.": (
                self.p2p != "auto" and self.kv_exchange == "mesh"
            ),
            f"--cp-in-flight {self.in_flight} is ignored: {algorithm} without --cp-kv-exchange direct, mesh or auto, "
            "or windows, forwards one step at a time.": self.in_flight not in (1, "auto")
            and not self._takes_several_steps,
            f"--cp-topology {self.topology} is ignored: neither --cp-kv-exchange nor --cp-in-flight is auto.": (
                self.topology != "auto" and "auto" not in (self.kv_exchange, self.in_flight)
            ),
            f"--cp-ulysses-chunks {self.ulysses_chunks} is ignored: {algorithm} exchanges no heads.": (
                self.ulysses_chunks > 1 and not row.splits_heads
            ),
            f"enable_alltoall False is ignored: {algorithm} uses no all-to-all.": not self.alltoall
            and not row.splits_heads,
            f"--cp-batch-layout balanced is contiguous for {algorithm}, whose ranks have equal work by nature.": (
                self.batch_layout == "balanced" and row.exchange is None and self.context_parallel_size > 1
            ),
            "--cp-log says nothing at --context-parallel-size 1 without --hybrid-context-parallel.": self.log
            and self.context_parallel_size == 1,
        }
        return [message for message, applies in ignored.items() if applies]

    @property
    def _takes_several_steps(self) -> bool:
        return self.row.exchange == "ring" and (self.kv_exchange != "ring" or self.window_size > 1)

    @property
    def hierarchy(self) -> Hierarchy:
        """(ulysses, window, windows), whose product is context_parallel_size (the one idea of the design)."""
        return self.row.hierarchy(self)

    @property
    def ring_size(self) -> int:
        _, window, windows = self.hierarchy
        return window * windows

    @property
    def causal(self) -> bool:
        """Whether a layer is causal when the batch brings no mask."""
        return self.attention_mask_type != "full"

    @property
    def layout_kind(self) -> Literal["contiguous", "zigzag", "document_zigzag", "balanced"]:
        """The kind that ``batch_layout`` stands for: by itself a causal ring is zigzag, everything else contiguous."""
        if self.batch_layout == "balanced" and self.ring_size == 1:
            return "contiguous"
        if self.batch_layout != "auto":
            return self.batch_layout
        return "zigzag" if self.ring_size > 1 and self.causal else "contiguous"

    def kv_cache_policy_for(self, layer_number: int) -> KVCachePolicy | None:
        """The policy of one layer; ``layer_number`` is global and 1-based, interval n means layer % (n + 1) == 1."""
        return self.kv_cache_policy if (layer_number - 1) % (self.kv_cache_interval + 1) == 0 else None

    def describe(self) -> str:
        """One phrase for the line that says what is on, such as "Ring, cp=4, zigzag, causal"."""
        ulysses, window, windows = self.hierarchy
        name = self.row.title
        if windows > 1:
            name = (
                f"Double {name} (window {window})" if ulysses == 1 else f"{name} (ulysses {ulysses}, window {window})"
            )
        elif 1 < ulysses < self.context_parallel_size:
            name = f"{name} (ulysses {ulysses}, ring {window})"
        parts = [
            name,
            f"cp={self.context_parallel_size}",
            self.layout_kind,
            self.attention_mask_type,
        ]
        if self.kv_exchange != "ring":
            parts.append(f"{self.kv_exchange} exchange")
        if self.in_flight != 1 and self._takes_several_steps:
            parts.append(f"{self.in_flight} steps in flight")
        if self.ulysses_chunks > 1 and self.row.splits_heads:
            parts.append(f"{self.ulysses_chunks} groups of heads")
        if self.p2p == "isend" and self.row.exchange == "ring":
            parts.append("single messages")
        if self.kv_cache_policy:
            parts.append(f"kv cache {self.kv_cache_policy}")
        if self.keep_attention:
            parts.append("attention kept across recomputation")
        if self.log:
            parts.append("logged")
        return ", ".join(parts)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What the launch script says about the model and the machine, as far as context parallelism must know it.

    ``recomputes_attention`` is None where it does not say whether layers, or core attention, are recomputed;
    ``half_precision`` is None where it trains in float32 or does not say.
    """

    num_attention_heads: int | None
    num_query_groups: int | None = None
    num_layers: int = 1
    seq_length: int | None = None
    world_size: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel: bool = False
    use_flash_attn: bool = True
    use_legacy_models: bool = False
    gather_size_calculator: str = "default"
    fused_update: bool = False
    recomputes_attention: bool | None = field(default=None, compare=False)
    half_precision: Literal["bfloat16", "float16"] | None = field(default=None, compare=False)
    notices: tuple[str, ...] = field(default=(), compare=False)

    @property
    def unaligned(self) -> bool:
        return self.gather_size_calculator != "default"


def resolve(config: ContextParallelConfig, setup: TrainingSetup) -> TrainingSetup:
    """Check ``config`` against ``setup`` and apply the fallbacks.

    Returns:
        The setup with every fallback applied; ``notices`` lists, in words, what was changed or is ignored. The caller
        says them once on rank 0.

    Raises:
        ValueError: a rule of the configuration is broken.
    """
    cp, asked, notices = config.context_parallel_size, setup, []
    if setup.unaligned and not config.row.splits_heads and cp > 1:
        notices.append(
            f"--gather-size-calculator {setup.gather_size_calculator} is ignored: only {names_with(splits_heads=True)} "
            "read it; "
            f"--context-parallel-algo {config.algorithm} takes any sequence length as it is."
        )
        setup = dataclasses.replace(setup, gather_size_calculator="default")
    setup = _fall_back_to_aligned(config, setup, notices)
    _check_world(config, setup)
    _check_heads(config, setup, asked)
    _check_chunks(config, setup)
    _check_length(config, setup)
    require(
        config.kv_cache_interval == 0 or config.kv_cache_interval < setup.num_layers,
        f"--context-parallel-cache-interval {config.kv_cache_interval} must be smaller than --num-layers "
        f"{setup.num_layers}; choose 0 to {setup.num_layers - 1}.",
    )
    if config.keep_attention and setup.recomputes_attention is False:
        notices.append(
            "--cp-keep-attention is ignored: nothing recomputes attention; add --recompute-granularity full, or "
            "selective with core_attn among --recompute-modules."
        )
    if cp > 1 and not setup.use_flash_attn:
        notices.append(f"--use-flash-attn is switched on: --context-parallel-size {cp} needs flash attention.")
        setup = dataclasses.replace(setup, use_flash_attn=True)
    return dataclasses.replace(setup, notices=setup.notices + tuple(notices))


def _fall_back_to_aligned(config: ContextParallelConfig, setup: TrainingSetup, notices: list[str]) -> TrainingSetup:
    """Unaligned Ulysses with a KV cache policy or legacy models becomes aligned Ulysses, said aloud."""
    if not setup.unaligned or config.context_parallel_size == 1 or config.row.any_length:
        return setup
    calculator = f"--gather-size-calculator {setup.gather_size_calculator}"
    others = [
        flag
        for flag, given in (
            (f"--context-parallel-kv-cache-policy {config.kv_cache_policy}", config.kv_cache_policy is not None),
            ("--use-legacy-models", setup.use_legacy_models),
        )
        if given
    ]
    if not others:
        return setup
    cp, length = config.context_parallel_size, setup.seq_length
    require(
        length is None or length % cp == 0,
        f"{calculator} does not work with {' and '.join(others)}, and aligned Ulysses needs --seq-length {length} "
        f"divisible by --context-parallel-size {cp}; drop {' and '.join(others)}, or use "
        f"--seq-length {(length or 0) // cp * cp or cp}.",
    )
    notices.append(f"{calculator} does not work with {' and '.join(others)}: falling back to aligned Ulysses.")
    return dataclasses.replace(setup, gather_size_calculator="default")


def _check_world(config: ContextParallelConfig, setup: TrainingSetup) -> None:
    if setup.world_size is None:
        return
    model = setup.tensor_parallel_size * setup.pipeline_parallel_size * config.context_parallel_size
    require(
        setup.world_size % model == 0,
        f"world size {setup.world_size} must be --tensor-model-parallel-size {setup.tensor_parallel_size} x "
        f"--context-parallel-size {config.context_parallel_size} x --pipeline-model-parallel-size "
        f"{setup.pipeline_parallel_size} x data parallel size; start {model} processes or a multiple of {model}.",
    )


def _check_heads(config: ContextParallelConfig, setup: TrainingSetup, asked: TrainingSetup) -> None:
    """asked: the setup before the fallbacks, so that no message offers what was given and could not be used."""
    heads, groups, tp = setup.num_attention_heads, setup.num_query_groups, setup.tensor_parallel_size
    degree = config.hierarchy[0]
    if heads is None:
        return
    if groups:
        require(
            heads % groups == 0,
            f"--num-query-groups {groups} must divide --num-attention-heads {heads}; choose "
            f"{divisors(heads, 1, heads)}.",
        )
    if degree > 1 and not setup.unaligned:
        flag, sizes = _degrees_for(config, heads // tp if heads % tp == 0 else 1)
        uneven = (
            "drop what made it fall back to aligned Ulysses" if asked.unaligned else "--gather-size-calculator dynamic"
        )
        require(
            heads % (tp * degree) == 0,
            f"--num-attention-heads {heads} must be divisible by --tensor-model-parallel-size {tp} x {flag} {degree} = "
            f"{tp * degree}; with these heads {flag} can be {sizes or 'nothing'}, or use --context-parallel-algo "
            f"{names_with(splits_heads=False)}, or {uneven} (uneven heads).",
        )
    if config.allgather_kv:
        require(
            groups is not None and groups < heads and groups == tp,
            f"--use-ulysses-allgather-kv needs grouped-query attention with one KV head per tensor-parallel rank: "
            f"--num-query-groups {groups} must equal --tensor-model-parallel-size {tp} and be smaller than "
            f"--num-attention-heads {heads}; use --num-query-groups {tp}, or leave out --use-ulysses-allgather-kv.",
        )


def _check_chunks(config: ContextParallelConfig, setup: TrainingSetup) -> None:
    if setup.num_attention_heads is None or config.ulysses_chunks == 1 or not config.row.splits_heads:
        return
    heads = -(-setup.num_attention_heads // (setup.tensor_parallel_size * config.hierarchy[0]))
    require(
        config.ulysses_chunks <= heads,
        f"--cp-ulysses-chunks {config.ulysses_chunks} must be at most the {heads} heads that a rank computes; use "
        f"--cp-ulysses-chunks {heads} or less.",
    )


def _degrees_for(config: ContextParallelConfig, heads: int) -> tuple[str, str]:
    """(flag of the Ulysses degree, as text the degrees that split so many heads and that other rules allow)."""
    cp = config.context_parallel_size
    if config.row.takes_degree:
        return "--ulysses-degree-in-cp", listed([d for d in range(2, cp) if cp % d == 0 and heads % d == 0])
    return "--context-parallel-size", divisors(heads, 1, cp)


def _check_length(config: ContextParallelConfig, setup: TrainingSetup) -> None:
    length, cp, tp = setup.seq_length, config.context_parallel_size, setup.tensor_parallel_size
    if length is None or cp == 1:
        return
    if not config.row.any_length and not setup.unaligned:
        require(
            length % cp == 0,
            f"--seq-length {length} must be divisible by --context-parallel-size {cp} for aligned Ulysses; use "
            f"--seq-length {length // cp * cp or cp} or {(length // cp + 1) * cp}, or --gather-size-calculator "
            "dynamic, which takes any length.",
        )
    if setup.sequence_parallel and tp > 1:
        require_even_tokens(length, cp, tp)
