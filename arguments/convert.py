"""Parsed flags -> ContextParallelConfig and TrainingSetup, checked against each other."""

import importlib
import sys
from contextlib import contextmanager

from mindspeed_cp.config import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.notices import is_rank0, warn_rank0


def config_from_args(args):
    """The ContextParallelConfig that the flags describe; raises ValueError for a combination that cannot work."""
    return ContextParallelConfig(
        context_parallel_size=args.context_parallel_size,
        algorithm=args.context_parallel_algo,
        ulysses_degree=args.ulysses_degree_in_cp,
        window_size=args.cp_window_size,
        attention_mask_type=args.cp_attention_mask_type,
        kv_cache_policy=args.context_parallel_kv_cache_policy,
        kv_cache_interval=args.context_parallel_cache_interval,
        allgather_kv=args.use_ulysses_allgather_kv,
        send_recv_overlap=args.use_cp_send_recv_overlap,
        alltoall=getattr(args, "cp_enable_alltoall", True),
        kv_exchange=args.cp_kv_exchange,
    )


def setup_from_args(args, world_size=None):
    """What the flags say about the model and the machine; ``world_size`` None is ``args.world_size``, 0 is unknown."""
    return TrainingSetup(
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if getattr(args, "group_query_attention", False) else None,
        num_layers=args.num_layers or 1,
        seq_length=args.seq_length,
        world_size=(getattr(args, "world_size", None) if world_size is None else world_size) or None,
        tensor_parallel_size=args.tensor_model_parallel_size,
        pipeline_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=bool(getattr(args, "sequence_parallel", False)),
        use_flash_attn=bool(args.use_flash_attn),
        use_legacy_models=bool(getattr(args, "use_legacy_models", False)),
        gather_size_calculator=args.gather_size_calculator,
        fused_update=bool(getattr(args, "use_fused_ring_attention_update", False)),
    )


def validate(args, world_size=None):
    """Check every rule, write the fallbacks back to ``args``, say each notice once on rank 0.

    Returns:
        (config, setup): the ContextParallelConfig, and the TrainingSetup after all fallbacks.

    Raises:
        ValueError: a rule is broken; the message names flag, value, rule and a way out.
    """
    config = config_from_args(args)
    setup = resolve(config, setup_from_args(args, world_size))
    _check_device_num(args, config, setup)
    _check_calculator(setup.gather_size_calculator)
    args.use_flash_attn, args.gather_size_calculator = setup.use_flash_attn, setup.gather_size_calculator
    for notice in (*getattr(args, "cp_notices", ()), *setup.notices, *_ignored_flags(args, config)):
        warn_rank0(notice)
    return config, setup


@contextmanager
def readable_errors(prog):
    """Turn a ValueError inside the block into one line on rank 0 and exit status 2."""
    try:
        yield
    except ValueError as error:
        if is_rank0():
            print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


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
    except ImportError as error:
        raise ValueError(f"--gather-size-calculator {name} cannot be imported ({error}); {way_out}.") from error
    if not callable(getattr(found, "calculate", None)):
        raise ValueError(
            f"--gather-size-calculator {name} must be a class with a method calculate(*args, **kwargs); {way_out}."
        )


def _ignored_flags(args, config):
    """Megatron's own context-parallel flags, which nothing here reads."""
    if config.context_parallel_size == 1:
        return
    kinds = getattr(args, "cp_comm_type", None)
    if kinds not in (None, "p2p", ["p2p"]):
        text = kinds if isinstance(kinds, str) else " ".join(map(str, kinds))
        yield (
            f"--cp-comm-type {text} is ignored: --context-parallel-algo {config.algorithm} decides how ranks "
            "communicate."
        )
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    if sizes:
        yield (
            f"--hierarchical-context-parallel-sizes {' '.join(map(str, sizes))} is ignored: use "
            "--context-parallel-algo "
            "hybrid_cp_algo with --ulysses-degree-in-cp."
        )
