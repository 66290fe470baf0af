"""The table for megatron.training and megatron.legacy, which come with a Megatron-LM checkout, not with megatron-core.

``training_device`` has what a checkout asks of machines without an accelerator.
"""

import importlib
import importlib.util
from contextlib import contextmanager, nullcontext
from functools import wraps

from mindspeed_cp.arguments import (
    add_context_parallel_arguments,
    compared_arguments,
    readable_errors,
    validate,
)
from mindspeed_cp.patches.checks import check_flags
from mindspeed_cp.patches.loss import loss_patches
from mindspeed_cp.patches.machine.compiler import outside_compiler
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.models import with_record
from mindspeed_cp.patches.step_log import log_patches

from mindspeed_cp.megatron.bridge import AttentionBridge, CoreAttention
from mindspeed_cp.megatron.state import with_tokens_everywhere
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.notices import warn_rank0

ARGUMENTS = "megatron.training.arguments"
LEGACY = "megatron.legacy.model.transformer"
LEGACY_LANGUAGE = "megatron.legacy.model.language_model"
PROGRAM = "pretrain_gpt.py"


def training_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    bridge = AttentionBridge(state)
    return [
        *loss_patches(state),
        *log_patches(state, without_checkout),
        Patch(
            f"{ARGUMENTS}.add_megatron_arguments",
            _add_flags,
            "Megatron's parser knows the flags of context parallelism",
            without_checkout,
        ),
        Patch(
            f"{ARGUMENTS}.validate_args",
            _validate(state),
            "flags become the configuration; uneven lengths and legacy models pass Megatron's assertions",
            without_checkout,
        ),
        Patch(
            f"{LEGACY}.ParallelAttention.__init__",
            _legacy_attention(state),
            "legacy models would ask for the flash-attn package; the core attention below is flash attention",
            without_legacy,
        ),
        Patch(
            f"{LEGACY}.CoreAttention.forward",
            _legacy_core_attention(state, bridge),
            "legacy models: attention over the whole sequence, of which each rank holds a part",
            without_legacy,
        ),
        Patch(
            f"{LEGACY}.ParallelTransformer.forward",
            _legacy_block(state),
            "legacy models: layers learn the true length of the micro-batch",
            without_legacy,
        ),
        Patch(
            f"{LEGACY_LANGUAGE}.TransformerLanguageModel.forward",
            with_record(state),
            "legacy models: a forward pass uses the layout and the documents of its own batch",
            without_legacy,
        ),
    ]


def without_checkout():
    """Why no checkout is patched: "" when megatron.training can be imported."""
    return _why_missing("megatron.training", "no Megatron-LM checkout (megatron.training) on the import path")


def without_legacy():
    return without_checkout() or _why_missing(LEGACY, "this Megatron-LM has no legacy models")


def _why_missing(module, missing):
    try:
        if importlib.util.find_spec(module) is None:
            return missing
        importlib.import_module(module)
    except ImportError as error:
        # The training script imports the same and shows the whole traceback.
        return f"{module} cannot be imported: {error}"
    return ""


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


def _add_flags(original):
    @wraps(original)
    def add_megatron_arguments(parser):
        return _refusing_together(add_context_parallel_arguments(original(parser)))

    return add_megatron_arguments


def _refusing_together(parser):
    """``parser``, whose errors end all ranks and not this one alone."""
    for name in ("parse_args", "parse_known_args"):
        setattr(parser, name, _told(getattr(parser, name)))
    return parser


def _told(parse):
    @wraps(parse)
    def parsed(*args, **kwargs):
        with readable_errors(PROGRAM):
            return parse(*args, **kwargs)

    return parsed


def _validate(state):
    def build(original):
        @wraps(original)
        def validate_args(args, *defaults, **kwargs):
            flash = args.use_flash_attn
            with readable_errors(PROGRAM, args.distributed_backend):
                # At size 1 the world is Megatron's business (0.12's encoder ranks are counted in no rule here).
                config, setup = validate(args, world_size=0 if args.context_parallel_size == 1 else None)
                check_flags(args)
            state.program = PROGRAM
            if config.context_parallel_size == 1:
                if getattr(args, "hybrid_context_parallel", False):
                    state.configure(config, setup=setup, kernel=args.cp_kernel)
                result = original(args, *defaults, **kwargs)
                state.compared = compared_arguments(args)
                return result
            switched_on, args.use_flash_attn = args.use_flash_attn, flash  # Megatron's checks are about its own kernels
            with _passing_assertions(args):
                result = original(args, *defaults, **kwargs)
            args.use_flash_attn = switched_on
            with readable_errors(PROGRAM):
                state.configure(config, setup=setup, kernel=args.cp_kernel, **_documents(args))
                if args.seq_length:
                    with_tokens_everywhere(SequenceLayout.build(config, args.seq_length))
            state.compared = compared_arguments(args)
            return result

        return validate_args

    return build


def _documents(args):
    """Where documents end when the batch has no mask: settings of AdaptorState.configure."""
    if not args.reset_attention_mask:
        return {}
    if not getattr(args, "create_attention_mask_in_dataloader", True):
        warn_rank0(_DOCUMENTS_WITHOUT_MASK)
    elif args.pipeline_model_parallel_size > 2:
        warn_rank0(_STAGES_WITHOUT_MASK)
    if args.reset_position_ids:
        return {"documents_from_position_ids": True}
    return {"end_of_document": _token_of_tokenizer}


def _token_of_tokenizer():
    """The end-of-document token; Megatron makes the tokenizer after it has validated the flags."""
    from megatron.training import get_tokenizer

    return get_tokenizer().eod


@contextmanager
def _passing_assertions(args):
    """Show Megatron's validation a length that 2 x cp divides, and no legacy models; both are supported here.

    Every version asserts seq_length % (2 * cp) == 0 and that legacy models and cp > 1 exclude each other. The length is
    rounded up for the check, and every attribute that took it over gets the true one back. The communication type is
    the algorithm's name here; Megatron would ask for the sizes of its own hierarchical groups.
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


def _legacy_attention(state):
    def build(original):
        @wraps(original)
        def __init__(self, *args, **kwargs):
            from megatron.training import get_args

            flags = get_args()
            if flags.context_parallel_size == 1:
                original(self, *args, **kwargs)
                return
            flash, flags.use_flash_attn = flags.use_flash_attn, False
            try:
                original(self, *args, **kwargs)
            finally:
                flags.use_flash_attn = flash

        return __init__

    return build


def _legacy_core_attention(state, bridge):
    def build(original):
        attend = outside_compiler(bridge.__call__)

        @wraps(original)
        def forward(self, query_layer, key_layer, value_layer, attention_mask):
            if state.cp_size == 1:
                return original(self, query_layer, key_layer, value_layer, attention_mask)
            scale = (
                self.scale_mask_softmax.scale or 1
            ) / self.norm_factor  # query-key layer scaling divides, then multiplies
            module = CoreAttention(
                layer_number=self.layer_number,
                causal=self.attn_mask_type.name == "causal",
                softmax_scale=scale,
                dropout_p=self.attention_dropout.p if self.training else 0.0,
                rng=_dropout_rng(self),
            )
            return attend(module, query_layer, key_layer, value_layer, attention_mask)

        return forward

    return build


def _dropout_rng(module):
    """The random state of dropout, as the original chooses it."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return nullcontext if module.sequence_parallel else lambda: get_cuda_rng_tracker().fork()


def _legacy_block(state):
    def build(original):
        @wraps(original)
        def forward(self, hidden_states, *args, **kwargs):
            if state.cp_size == 1:
                return original(self, hidden_states, *args, **kwargs)
            from megatron.core.parallel_state import get_tensor_model_parallel_world_size

            rows = (hidden_states if self.pre_process else self.input_tensor).size(0)
            local_len = rows * get_tensor_model_parallel_world_size() if self.sequence_parallel else rows
            with state.running(state.micro_batch(local_len)):
                return original(self, hidden_states, *args, **kwargs)

        return forward

    return build
