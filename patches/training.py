"""Patches of a Megatron-LM checkout: its flags include those of context parallelism, and its log the costs of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

from mindspeed_cp.arguments import (
    add_context_parallel_arguments,
    compared_arguments,
    readable_errors,
    validate,
)
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.flag_checks import check_flags
from mindspeed_cp.megatron.following import configure
from mindspeed_cp.megatron.neighbour import is_here
from mindspeed_cp.megatron.splitting import with_tokens_everywhere
from mindspeed_cp.megatron.targets import moved_by_the_model
from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.rows import arguments_of, patch
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.notices import warn_rank0

ARGUMENTS = "megatron.training.arguments"
LOOP = "megatron.training.training"
PROGRAM = "pretrain_gpt.py"
_DOCUMENTS_WITHOUT_MASK = (
    "--reset-attention-mask with --no-create-attention-mask-in-dataloader: attention stays within documents here, "
    "while Megatron's own --context-parallel-size 1 has no mask then and attends across them; leave "
    "--no-create-attention-mask-in-dataloader out there to compare the two."
)
_STAGES_WITHOUT_MASK = (
    "--reset-attention-mask with more than two pipeline stages: Megatron gives the mask to the first and the last "
    "stage alone, and layers in between attend across documents, whatever --context-parallel-size; with "
    "--no-create-attention-mask-in-dataloader every stage gets the document boundaries here."
)


@patch(
    f"{ARGUMENTS}.add_megatron_arguments",
    reason="Megatron's parser knows the flags of context parallelism",
    when=without_checkout,
)
def add_megatron_arguments(adaptor: Adaptor, original: Callable[..., Any], parser: Any) -> Any:
    if is_here():  # MindSpeed adds its flags later, and patches/features_manager.py the rest
        return _refusing_together(original(parser))
    return _refusing_together(add_context_parallel_arguments(original(parser)))


def _refusing_together(parser: Any) -> Any:
    """Make errors of ``parser`` end all ranks, not only this one."""
    for name in ("parse_args", "parse_known_args"):
        setattr(parser, name, _told(getattr(parser, name)))
    return parser


def _told(parse: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(parse)
    def parsed(*args: Any, **kwargs: Any) -> Any:
        with readable_errors(PROGRAM):
            return parse(*args, **kwargs)

    return parsed


@patch(
    f"{ARGUMENTS}.validate_args",
    reason="flags become the configuration; uneven lengths and legacy models pass Megatron's assertions",
    when=without_checkout,
)
def validate_args(adaptor: Adaptor, original: Callable[..., Any], args: Any, *defaults: Any, **kwargs: Any) -> Any:
    flash, settings = args.use_flash_attn, adaptor.settings
    with readable_errors(PROGRAM, args.distributed_backend):
        # With size 1 the world size is left to Megatron (no rule here counts 0.12's encoder ranks).
        config, setup = validate(args, world_size=0 if args.context_parallel_size == 1 else None)
        check_flags(args)
        settings.moving_targets = args if is_here() and moved_by_the_model(args) else None
    settings.program, settings.asked_for_flash = PROGRAM, setup.asked_for_flash
    if config.context_parallel_size == 1:
        if getattr(args, "hybrid_context_parallel", False):
            configure(adaptor, config, setup=setup, kernel=args.cp_kernel)
        result = original(args, *defaults, **kwargs)
        settings.compared = compared_arguments(args)
        return result
    switched_on, args.use_flash_attn = args.use_flash_attn, flash  # Megatron's checks concern its own kernels
    with _passing_assertions(args):
        result = original(args, *defaults, **kwargs)
    args.use_flash_attn = switched_on
    with readable_errors(PROGRAM):
        configure(adaptor, config, setup=setup, kernel=args.cp_kernel, **_documents(args))
        if args.seq_length:
            with_tokens_everywhere(SequenceLayout.build(config, args.seq_length))
    settings.compared = compared_arguments(args)
    return result


def _documents(args: Any) -> dict[str, Any]:
    """Keywords of Adaptor.configure that say where documents end if the batch has no mask."""
    if not args.reset_attention_mask:
        return {}
    if not getattr(args, "create_attention_mask_in_dataloader", True):
        warn_rank0(_DOCUMENTS_WITHOUT_MASK)
    elif args.pipeline_model_parallel_size > 2:
        warn_rank0(_STAGES_WITHOUT_MASK)
    if args.reset_position_ids:
        return {"documents_from_position_ids": True}
    return {"end_of_document": _token_of_tokenizer}


def _token_of_tokenizer() -> int:
    """The end-of-document token; called later, since Megatron creates the tokenizer after validating the flags."""
    from megatron.training import get_tokenizer

    return int(get_tokenizer().eod)


@contextmanager
def _passing_assertions(args: Any) -> Iterator[None]:
    """During Megatron's validation, show a length that 2 x cp divides, and no legacy models; both are supported here.

    Every version asserts seq_length % (2 * cp) == 0 and that legacy models and cp > 1 exclude each other. The length is
    rounded up for the check, and every attribute that copied it is then restored to the true length. The communication
    type is hidden too, because Megatron would require the sizes of its own hierarchical groups.
    """
    length, legacy, limit = args.seq_length, getattr(args, "use_legacy_models", False), args.max_position_embeddings
    step = 2 * args.context_parallel_size
    rounded = length if length is None or length % step == 0 else (length // step + 1) * step
    kinds = getattr(args, "cp_comm_type", None)
    args.seq_length, args.use_legacy_models, args.cp_comm_type = rounded, False, ["p2p"]
    if rounded != length and limit is not None and limit >= length:
        args.max_position_embeddings = max(limit, rounded)
    try:
        yield
    finally:
        args.use_legacy_models, args.max_position_embeddings, args.cp_comm_type = legacy, limit, kinds
        if rounded != length:
            for name in ("seq_length", "encoder_seq_length", "decoder_seq_length"):
                if getattr(args, name, None) == rounded:
                    setattr(args, name, length)


# Costs of context parallelism, by --cp-log.


@patch(
    f"{LOOP}.train_step",
    reason="--cp-log measures the steps of training, not those of validation",
    when=without_checkout,
    essential=False,
)
def train_step(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if adaptor.log is None:
        return original(*args, **kwargs)
    with adaptor.log.step():
        return original(*args, **kwargs)


@patch(
    f"{LOOP}.training_log",
    reason="--cp-log prints when Megatron does, and uses its TensorBoard writer",
    when=without_checkout,
    essential=False,
)
def training_log(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    if adaptor.log is not None:
        # The place of the iteration differs between versions.
        _report(adaptor, arguments_of(original, args, kwargs)["iteration"])
    return result


def _report(adaptor: Adaptor, iteration: int) -> None:
    """Report at the end of an interval, on all ranks: rank 0 prints; the last rank, with Megatron's writer, writes.

    The first report repeats the startup line, because the original is far above, between Megatron's lines.
    """
    from megatron.training import get_args, get_tensorboard_writer

    if iteration % get_args().log_interval:
        return
    assert adaptor.log is not None
    figures, writer = adaptor.log.interval(), get_tensorboard_writer()
    if dist.get_rank() == 0:
        again = f"\n{adaptor.told}" if iteration == get_args().log_interval else ""
        print(f" iteration {iteration} | {figures.line()}{again}", flush=True)
    if writer:
        for name, value in figures.scalars().items():
            writer.add_scalar(name, value, iteration)
