"""Parsed flags -> ContextParallelConfig and TrainingSetup, checked against each other."""

import importlib
import sys
from contextlib import contextmanager

from mindspeed_cp.arguments.comm_type import ALGORITHM_OF, Choice, choice_of_comm_type, comm_kinds, degree_from_sizes
from mindspeed_cp.arguments.mindspeed_flags import (
    notices_of_accepted,
    refusal_of_algorithm,
    refusal_of_positions,
)

from mindspeed_cp.settings.agreement import SAID, refuse
from mindspeed_cp.settings.config import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.settings.notices import warn_rank0


def config_from_args(args):
    """The ContextParallelConfig that the flags describe; raises ValueError for a combination that cannot work."""
    choice = chosen_algorithm(args)
    return ContextParallelConfig(
        context_parallel_size=args.context_parallel_size,
        algorithm=choice.algorithm,
        ulysses_degree=choice.ulysses_degree,
        window_size=args.cp_window_size,
        attention_mask_type=args.cp_attention_mask_type,
        kv_cache_policy=args.context_parallel_kv_cache_policy,
        kv_cache_interval=args.context_parallel_cache_interval,
        allgather_kv=args.use_ulysses_allgather_kv,
        send_recv_overlap=args.use_cp_send_recv_overlap,
        alltoall=getattr(args, "cp_enable_alltoall", True),
        kv_exchange=args.cp_kv_exchange,
        in_flight=getattr(args, "cp_in_flight", 1),
        topology=getattr(args, "cp_topology", "auto"),
        ulysses_chunks=getattr(args, "cp_ulysses_chunks", 1),
        p2p=getattr(args, "cp_p2p", "auto"),
        batch_layout=getattr(args, "cp_batch_layout", "auto"),
        keep_attention=getattr(args, "cp_keep_attention", False),
        log=getattr(args, "cp_log", False),
    )


def chosen_algorithm(args):
    """The algorithm that was named: by --context-parallel-algo, else by --cp-comm-type, else the default.

    A parser notes in ``args.cp_given`` what was given; in a namespace without the note every name was, and every
    communication type but p2p, Megatron's default.

    Raises:
        ValueError: the name belongs to MindSpeed alone, or the communication type is none or not one.
    """
    name = args.context_parallel_algo
    refusal = refusal_of_algorithm(name)
    if refusal:
        raise ValueError(refusal)
    cp, degree = args.context_parallel_size, args.ulysses_degree_in_cp
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    if cp > 1 and not _algorithm_is_given(args) and _given_kinds(args):
        return choice_of_comm_type(_given_kinds(args), cp, sizes, degree)
    return Choice(name, degree_from_sizes(cp, sizes, degree) if name == "hybrid_cp_algo" else degree)


def _algorithm_is_given(args):
    return "context_parallel_algo" in getattr(args, "cp_given", ("context_parallel_algo",))


def _given_kinds(args):
    """The communication types that somebody gave, () for Megatron's default."""
    kinds = comm_kinds(getattr(args, "cp_comm_type", None))
    return kinds if "cp_comm_type" in getattr(args, "cp_given", ()) or kinds != ("p2p",) else ()


def setup_from_args(args, world_size=None):
    """What the flags say about the model and the machine; ``world_size`` None is ``args.world_size``, 0 is unknown."""
    return TrainingSetup(
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if getattr(args, "group_query_attention", False) else None,
        num_layers=args.num_layers or args.context_parallel_cache_interval + 1,  # not known: no rule is broken
        seq_length=args.seq_length,
        world_size=(getattr(args, "world_size", None) if world_size is None else world_size) or None,
        tensor_parallel_size=args.tensor_model_parallel_size,
        pipeline_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=bool(getattr(args, "sequence_parallel", False)),
        use_flash_attn=bool(args.use_flash_attn),
        use_legacy_models=bool(getattr(args, "use_legacy_models", False)),
        gather_size_calculator=args.gather_size_calculator,
        fused_update=bool(getattr(args, "use_fused_ring_attention_update", False)),
        recomputes_attention=_recomputes_attention(args),
        half_precision="bfloat16"
        if getattr(args, "bf16", False)
        else "float16"
        if getattr(args, "fp16", False)
        else None,
    )


def _recomputes_attention(args):
    """Whether Megatron's checkpoints run attention twice; None where ``args`` are not Megatron's."""
    if not hasattr(args, "recompute_granularity"):
        return None
    modules = getattr(args, "recompute_modules", None) or ["core_attn"]  # Megatron's default
    selective = args.recompute_granularity == "selective" or getattr(args, "recompute_activations", False)
    return args.recompute_granularity == "full" or (selective and "core_attn" in modules)


def validate(args, world_size=None):
    """Check every rule, write the fallbacks back to ``args``, say each notice once on rank 0.

    Returns:
        (config, setup): the ContextParallelConfig, and the TrainingSetup after all fallbacks.

    Raises:
        ValueError: a rule is broken; the message names flag, value, rule and a way out.
    """
    refusal = refusal_of_positions(getattr(args, "position_embedding_type", None))
    if refusal and args.context_parallel_size > 1:
        raise ValueError(refusal)
    config = config_from_args(args)
    setup = resolve(config, setup_from_args(args, world_size))
    _check_device_num(args, config, setup)
    _check_calculator(setup.gather_size_calculator)
    args.use_flash_attn, args.gather_size_calculator = setup.use_flash_attn, setup.gather_size_calculator
    ignored = (*notices_of_accepted(args), *_ignored_flags(args, config))
    args.context_parallel_algo, args.ulysses_degree_in_cp = config.algorithm, config.ulysses_degree
    for notice in (*getattr(args, "cp_notices", ()), *setup.notices, *ignored):
        warn_rank0(notice)
    return config, setup


class Refused(SystemExit):
    """The end of a rank whose settings cannot work, after the other ranks were told."""


@contextmanager
def readable_errors(prog, backend="nccl"):
    """Turn a ValueError inside the block into one line and exit status 2, on all ranks together.

    The other ranks are told, so that none waits for one that has left; rank 0 prints the line. A parser that ended the
    program has printed its own.

    Args:
        backend: of the process group that the ranks are about to make.
    """

    def say(message):
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


def _check_device_num(args, config, setup):
    """The file's device_num = data_parallel x model_parallel x context_parallel x pipeline_stage."""
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


def _check_calculator(name):
    """An own calculator must be importable now, not in the middle of the first step."""
    if name in ("default", "dynamic"):
        return
    module, _, attribute = name.partition(":")
    way_out = "choose default or dynamic, or name an importable class as package.module:Class"
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"--gather-size-calculator {name} cannot be imported ({reason}); {way_out}.") from error
    if not callable(getattr(found, "calculate", None)):
        raise ValueError(
            f"--gather-size-calculator {name} must be a class with a method calculate(*args, **kwargs); {way_out}."
        )


def _ignored_flags(args, config):
    """Megatron's own context-parallel flags, where the algorithm was named otherwise."""
    if config.context_parallel_size == 1:
        return
    kinds = _given_kinds(args)
    if any(ALGORITHM_OF.get(kind) != config.algorithm for kind in kinds) and _algorithm_is_given(args):
        yield (
            f"--cp-comm-type {' '.join(kinds)} is ignored: --context-parallel-algo {config.algorithm} decides how "
            "ranks communicate."
        )
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    if sizes and not config.ulysses_degree and _algorithm_is_given(args):
        yield (
            f"--hierarchical-context-parallel-sizes {' '.join(map(str, sizes))} is ignored: "
            f"--context-parallel-algo {config.algorithm} has one level; use hybrid_cp_algo."
        )
