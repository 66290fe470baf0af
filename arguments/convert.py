"""Convert parsed flags to ContextParallelConfig and TrainingSetup, and check them against each other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mindspeed_cp.arguments import declared
from mindspeed_cp.arguments.algorithm import Choice, algorithm_is_given, chosen_algorithm, given_kinds
from mindspeed_cp.arguments.mindspeed_flags import notices_of_accepted, refusal_of_positions
from mindspeed_cp.arguments.packing import documents_on_any_ranks
from mindspeed_cp.settings.agreement import SAID, refuse
from mindspeed_cp.settings.algorithms import algorithm_named, names_with
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import warn_rank0
from mindspeed_cp.settings.setting import declarations
from mindspeed_cp.settings.training_setup import TrainingSetup, resolve


def config_from_args(args: Any) -> ContextParallelConfig:
    """The ContextParallelConfig that the flags describe; raises ValueError for a combination that cannot work."""
    return _config(args, chosen_algorithm(args))[0]


def _config(args: Any, choice: Choice) -> tuple[ContextParallelConfig, str]:
    """The configuration, and a notice of what Megatron's packing flags set in it."""
    values = {each.name: getattr(args, each.dest, each.unset) for each in declarations(declared.CONFIG)}
    values |= {"algorithm": choice.algorithm, "ulysses_degree": choice.ulysses_degree}
    if choice.layers is not None:
        values["layer_algorithms"] = choice.layers
    packing, notice = documents_on_any_ranks(args, values)
    return declared.CONFIG(**(values | packing)), notice


def setup_from_args(args: Any, world_size: int | None = None) -> TrainingSetup:
    """Model and machine according to the flags; ``world_size`` None means ``args.world_size``, 0 means unknown."""
    values: dict[str, Any] = {}
    for each in declarations(TrainingSetup):
        value = getattr(args, each.dest, each.unset)
        values[each.name] = bool(value) if each.switch else value
    values |= {
        "num_query_groups": values["num_query_groups"] if getattr(args, "group_query_attention", False) else None,
        "world_size": (values["world_size"] if world_size is None else world_size) or None,
    }
    half: Any = "bfloat16" if getattr(args, "bf16", False) else "float16" if getattr(args, "fp16", False) else None
    return TrainingSetup(
        **values,
        recomputes_attention=_recomputes_attention(args),
        half_precision=half,
        head_dim=_head_dim(args),
        micro_batch_size=getattr(args, "micro_batch_size", None) or 1,
        asked_for_flash=values["use_flash_attn"],
    )


def _head_dim(args: Any) -> int | None:
    """The head dimension, None if the flags do not determine it; multi-latent attention has several."""
    if getattr(args, "multi_latent_attention", False):
        return None
    if getattr(args, "kv_channels", None):
        return int(args.kv_channels)
    hidden, heads = getattr(args, "hidden_size", None), args.num_attention_heads
    return hidden // heads if hidden and heads else None


def _recomputes_attention(args: Any) -> bool | None:
    """Whether Megatron's activation recomputation runs attention twice; None if ``args`` are not Megatron's."""
    if not hasattr(args, "recompute_granularity"):
        return None
    modules = getattr(args, "recompute_modules", None) or ["core_attn"]  # Megatron's default
    selective = args.recompute_granularity == "selective" or getattr(args, "recompute_activations", False)
    return args.recompute_granularity == "full" or (selective and "core_attn" in modules)


def validate(
    args: Any, world_size: int | None = None, node_ranks: int | None = None
) -> tuple[ContextParallelConfig, TrainingSetup]:
    """Check every rule, write the fallbacks back to ``args``, and print each notice once on rank 0.

    Args:
        world_size: None means ``args.world_size``, 0 means unknown.
        node_ranks: ranks per node; None means the launcher's number.

    Returns:
        (config, setup): the ContextParallelConfig, and the TrainingSetup after all fallbacks.

    Raises:
        ValueError: a rule is broken; the message names flag, value, rule and a way out.
    """
    refusal = refusal_of_positions(getattr(args, "position_embedding_type", None))
    if refusal and args.context_parallel_size > 1:
        raise ValueError(refusal)
    choice = chosen_algorithm(args, node_ranks)
    config, packed = _config(args, choice)
    setup = resolve(config, setup_from_args(args, world_size))
    _check_device_num(args, config, setup)
    if setup.unaligned:
        _find_calculator(setup.gather_size_calculator)
    args.use_flash_attn, args.gather_size_calculator = setup.use_flash_attn, setup.gather_size_calculator
    ignored = (*notices_of_accepted(args, declared.declared()), *_ignored_flags(args, config))
    args.context_parallel_algo, args.ulysses_degree_in_cp = config.algorithm, config.ulysses_degree
    args.cp_layer_algo = config.layer_algorithms
    for notice in filter(None, (*getattr(args, "cp_notices", ()), choice.notice, packed, *setup.notices, *ignored)):
        warn_rank0(notice)
    return config, setup


class Refused(SystemExit):
    """Exit of a rank whose settings are invalid, after the other ranks have been told."""


@contextmanager
def readable_errors(prog: str, backend: str = "nccl") -> Iterator[None]:
    """Turn a ValueError inside the block into one line and exit status 2, on all ranks.

    The other ranks are told, so that none waits for one that has exited; rank 0 prints the line. A parser that ended
    the program has already printed its message.

    Args:
        backend: backend of the process group that the ranks are about to make.
    """

    def say(message: str) -> None:
        if message != SAID:
            print(f"{prog}: error: {message}", file=sys.stderr, flush=True)

    try:
        yield
    except ValueError as error:
        refuse(str(error), say=say, backend=backend)
        raise Refused(2) from None
    except SystemExit as error:
        if error.code and not isinstance(error, Refused):
            refuse(SAID, say=say, backend=backend)
            raise Refused(error.code) from None
        raise


def _check_device_num(args: Any, config: ContextParallelConfig, setup: TrainingSetup) -> None:
    """Check device_num = data_parallel x model_parallel x context_parallel x pipeline_stage of the file."""
    data_parallel = getattr(args, "cp_data_parallel_size", None)
    if data_parallel is None or setup.world_size is None:
        return
    product = data_parallel * setup.tensor_parallel_size * config.context_parallel_size * setup.pipeline_parallel_size
    if product != setup.world_size:
        raise ValueError(
            f"--cp-config {args.cp_config}: device_num = data_parallel {data_parallel} x model_parallel "
            f"{setup.tensor_parallel_size} x context_parallel {config.context_parallel_size} x pipeline_stage "
            f"{setup.pipeline_parallel_size} = {product}, and {setup.world_size} processes run; start {product} "
            "processes, or "
            "change parallel_config."
        )


def _find_calculator(name: str) -> None:
    """Import a custom calculator now, so that a wrong name fails before the first step."""
    from mindspeed_cp.attention.gather_size import calculator_named  # with torch, which only this needs

    calculator_named(name)


def _ignored_flags(args: Any, config: ContextParallelConfig) -> Iterator[str]:
    """Notices of Megatron's own context-parallel flags that are ignored because another flag names the algorithm."""
    if config.context_parallel_size == 1:
        return
    kinds, is_given = given_kinds(args), algorithm_is_given(args)
    if any(algorithm_named("comm_types", kind) != config.algorithm for kind in kinds) and is_given:
        yield (
            f"--cp-comm-type {' '.join(kinds)} is ignored: --context-parallel-algo {config.algorithm} decides how "
            "ranks communicate."
        )
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    if sizes and not config.ulysses_degree and is_given:
        yield (
            f"--hierarchical-context-parallel-sizes {' '.join(map(str, sizes))} is ignored: "
            f"--context-parallel-algo {config.algorithm} has one level; use {names_with(takes_degree=True)}."
        )
