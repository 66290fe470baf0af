"""``TrainingSetup``: what a launch script says about model and machine; ``resolve`` checks a configuration against it
and applies the fallbacks.
"""

import dataclasses
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

from mindspeed_cp.settings.algorithms import names_with
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.layers import FLAG
from mindspeed_cp.settings.rules import divisors, listed, require, require_even_tokens, said_of
from mindspeed_cp.settings.setting import declarations, megatrons, setting

_CALCULATOR = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _calculator(text: str) -> str:
    require(
        text in ("default", "dynamic") or _CALCULATOR.fullmatch(text),
        f"--gather-size-calculator {text} is not known; choose default or dynamic, or name your class as "
        "package.module:Class.",
    )
    return text


def _class_names(text: str) -> str:
    require(
        re.fullmatch(r"[A-Za-z_][\w.]*(,[A-Za-z_][\w.]*)*", text),
        f"--cp-trust {text} names no classes; give their names, with or without modules, separated by commas.",
    )
    return text


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What the launch script says about model and machine, as far as context parallelism needs it.

    ``recomputes_attention`` is None if it is unknown whether layers, or core attention, are recomputed;
    ``half_precision`` is None for float32 or if unknown; ``head_dim`` is None if unknown; ``asked_for_flash`` says
    whether the user gave --use-flash-attn, which context parallelism also switches on itself.
    """

    num_attention_heads: int | None = megatrons(None)
    num_query_groups: int | None = megatrons(None)
    num_layers: int | None = megatrons(None)
    mtp_num_layers: int | None = megatrons(None)
    seq_length: int | None = megatrons(None)
    world_size: int | None = megatrons(None)
    tensor_parallel_size: int = megatrons(
        1,
        flag="--tensor-model-parallel-size",
        least=1,
        least_means="1 splits no layer",
        keys=("parallel_config.model_parallel", "parallel_config.tensor_model_parallel_size"),
    )
    pipeline_parallel_size: int = megatrons(
        1,
        flag="--pipeline-model-parallel-size",
        least=1,
        least_means="1 is no pipeline",
        keys=("parallel_config.pipeline_stage", "parallel_config.pipeline_model_parallel_size"),
    )
    sequence_parallel: bool = megatrons(
        False, keys=("parallel_config.use_seq_parallel", "parallel_config.sequence_parallel")
    )
    use_legacy_models: bool = megatrons(False)
    gather_size_calculator: str = setting(
        "default",
        flag="--gather-size-calculator",
        help="where unaligned Ulysses finds the true sequence length",
        rule="no KV cache policy, no legacy models; with Hybrid it allows uneven heads; ignored by the algorithms that "
        "split no heads",
        meanings={
            "default": "aligned, the length is a multiple of the context parallel size",
            "dynamic": "any length, read from the batch",
        },
        takes="package.module:Class",
        parse=_calculator,
    )
    fused_update: bool = setting(
        False,
        flag="--use-fused-ring-attention-update",
        help="merge blocks by the NPU's fused operator",
        rule="kernels without one ignore it, with a notice",
    )
    trusted_classes: str | None = setting(
        None,
        flag="--cp-trust",
        help="module classes to build although context parallelism is not known to compute them, separated by commas",
        rule="prove them first; only Megatron's training uses it",
        takes="Class,package.module.Class",
        parse=_class_names,
    )
    use_flash_attn: bool = setting(
        True,
        flag="--use-flash-attn",
        keys=("model.model_config.use_flash_attention",),
        help="use the device's flash attention",
        rule="context parallelism needs it and switches it on, with a notice",
        unset=False,
        shares=False,
    )
    recomputes_attention: bool | None = field(default=None, compare=False)
    half_precision: Literal["bfloat16", "float16"] | None = field(default=None, compare=False)
    head_dim: int | None = field(default=None, compare=False)
    micro_batch_size: int = field(default=1, compare=False)
    asked_for_flash: bool = field(default=False, compare=False)
    notices: tuple[str, ...] = field(default=(), compare=False)

    @property
    def all_layers(self) -> int | None:
        """Layers with attention, those of multi-token prediction included; None where that is not known."""
        return None if self.num_layers is None else self.num_layers + (self.mtp_num_layers or 0)

    @property
    def unaligned(self) -> bool:
        return self.gather_size_calculator != "default"


def resolve(config: ContextParallelConfig, setup: TrainingSetup) -> TrainingSetup:
    """Check ``config`` against ``setup`` and apply the fallbacks.

    Returns:
        The setup with every fallback applied; its ``notices`` say what was changed or is ignored. The caller prints
        them once on rank 0.

    Raises:
        ValueError: a rule is violated.
    """
    for each in declarations(TrainingSetup):
        if each.whole and each.least is not None:
            each.check(getattr(setup, each.name))
    cp, asked, notices = config.context_parallel_size, setup, []
    _check_named_layers(config, setup)
    used = config.used_by(setup.all_layers)
    if setup.unaligned and not any(each.row.splits_heads for each in used) and cp > 1:
        notices.append(
            f"--gather-size-calculator {setup.gather_size_calculator} is ignored: only {names_with(splits_heads=True)} "
            "read it; "
            f"--context-parallel-algo {config.algorithm} takes any sequence length as it is."
        )
        setup = dataclasses.replace(setup, gather_size_calculator="default")
    for of_layers in used:
        setup = _fall_back_to_aligned(of_layers, setup, notices)
    _check_world(config, setup)
    for of_layers in used:
        named = config.layers_of(of_layers)
        with said_of(f"{FLAG} {' and '.join(map(str, named))}") if named else nullcontext():
            _check_heads(of_layers, setup, asked)
            _check_chunks(of_layers, setup)
    _check_length(config, setup)
    require(
        config.kv_cache_interval == 0 or setup.num_layers is None or config.kv_cache_interval < setup.num_layers,
        f"--context-parallel-cache-interval {config.kv_cache_interval} must be smaller than --num-layers "
        f"{setup.num_layers}; choose 0 to {(setup.num_layers or 1) - 1}.",
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


def _check_named_layers(config: ContextParallelConfig, setup: TrainingSetup) -> None:
    if setup.all_layers is None:
        return
    for entry in config.entries:
        first, step = entry.layers.first, entry.layers.step
        last = first if entry.layers.last is None else entry.layers.last - (entry.layers.last - first) % step
        open_end = f"{first}-" if step == 1 else f"{first}-/{step}"
        mtp = f" and --mtp-num-layers {setup.mtp_num_layers}, which come behind them" if setup.mtp_num_layers else ""
        require(
            last < setup.all_layers,
            f"{FLAG} {entry.layers} names layer {last}, and --num-layers is {setup.num_layers}{mtp}; layers count from "
            f"0 to {setup.all_layers - 1}, and {open_end} goes on to the end.",
        )


def _fall_back_to_aligned(config: ContextParallelConfig, setup: TrainingSetup, notices: list[str]) -> TrainingSetup:
    """Unaligned Ulysses with a KV cache policy or legacy models becomes aligned Ulysses, with a notice."""
    if not setup.unaligned or config.context_parallel_size == 1 or config.row.any_length:
        return setup
    calculator = f"--gather-size-calculator {setup.gather_size_calculator}"
    policy = config.kv_cache_policy
    given = [f"--context-parallel-kv-cache-policy {policy}"] if policy else []
    others = " and ".join([*given, *(["--use-legacy-models"] if setup.use_legacy_models else [])])
    if not others:
        return setup
    cp, length = config.context_parallel_size, setup.seq_length
    require(
        length is None or length % cp == 0,
        f"{calculator} does not work with {others}, and aligned Ulysses needs --seq-length {length} "
        f"divisible by --context-parallel-size {cp}; drop {others}, or use "
        f"--seq-length {(length or 0) // cp * cp or cp}.",
    )
    notices.append(f"{calculator} does not work with {others}: falling back to aligned Ulysses.")
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


def _check_chunks(config: ContextParallelConfig, setup: TrainingSetup) -> None:
    if setup.num_attention_heads is None or config.ulysses_chunks == 1 or not config.row.splits_heads:
        return
    heads = -(-setup.num_attention_heads // (setup.tensor_parallel_size * config.hierarchy[0]))
    require(
        config.ulysses_chunks <= heads,
        f"--cp-ulysses-chunks {config.ulysses_chunks} must be at most the {heads} heads that a rank computes; use "
        f"--cp-ulysses-chunks {heads} or less.",
    )


def _check_heads(config: ContextParallelConfig, setup: TrainingSetup, asked: TrainingSetup) -> None:
    """Check the heads; ``asked`` is the setup before the fallbacks, so that messages do not suggest what was given."""
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


def _degrees_for(config: ContextParallelConfig, heads: int) -> tuple[str, str]:
    """(flag of the Ulysses degree, the degrees that split this number of heads and satisfy other rules, as text)."""
    cp = config.context_parallel_size
    if config.row.takes_degree:
        return "--ulysses-degree-in-cp", listed([d for d in range(2, cp) if cp % d == 0 and heads % d == 0])
    return "--context-parallel-size", divisors(heads, 1, cp)


def _check_length(config: ContextParallelConfig, setup: TrainingSetup) -> None:
    length, cp, tp = setup.seq_length, config.context_parallel_size, setup.tensor_parallel_size
    if length is None or cp == 1:
        return
    if not config.takes_any_length(setup.all_layers) and not setup.unaligned:
        require(
            length % cp == 0,
            f"--seq-length {length} must be divisible by --context-parallel-size {cp} for aligned Ulysses; use "
            f"--seq-length {length // cp * cp or cp} or {(length // cp + 1) * cp}, or --gather-size-calculator "
            "dynamic, which takes any length.",
        )
    if setup.sequence_parallel and tp > 1:
        require_even_tokens(length, cp, tp)
