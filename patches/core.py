"""The table of megatron-core names that are patched, each with its reason.

With context_parallel_size 1 every replacement calls the original with the arguments it got. Two things that the local
DotProductAttention refuses with an error are computed here instead: packed sequences, and multi-latent attention.
"""

import copy
import importlib.util
import inspect
from contextlib import nullcontext
from datetime import timedelta
from functools import wraps

from mindspeed_cp.patches.batch import batch_patches
from mindspeed_cp.patches.dynamic import build_sizes, check_launch, dynamic_patches, ranks_of_all
from mindspeed_cp.patches.experts import expert_patches
from mindspeed_cp.patches.machine.compiler import outside_compiler
from mindspeed_cp.patches.machine.hccl import hccl_buffers
from mindspeed_cp.patches.mamba import mamba_patches
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.models import model_patches
from mindspeed_cp.patches.mtp import mtp_patches
from mindspeed_cp.patches.pipeline import pipeline_patches
from mindspeed_cp.patches.recompute import recompute_patches
from mindspeed_cp.patches.rope import rope_patches
from mindspeed_cp.patches.transformer_engine import keep_arguments

from mindspeed_cp.compat import process_groups
from mindspeed_cp.megatron.bridge import AttentionBridge, CoreAttention, layer_window
from mindspeed_cp.megatron.decision import take_comm_type
from mindspeed_cp.megatron.start import agreed_config

DOT_PRODUCT = "megatron.core.transformer.dot_product_attention.DotProductAttention"
TE_DOT_PRODUCT = "megatron.core.extensions.transformer_engine.TEDotProductAttention"
PARALLEL_STATE = "megatron.core.parallel_state"
TRANSFORMER_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
CAUSAL_TYPES = ("causal", "padding_causal", "causal_bottom_right")  # of AttnMaskType; queries are as many as keys


def core_patches(state, announce):
    """The table for megatron-core.

    Args:
        state: AdaptorState that the replacements share.
        announce: config -> None, called on every rank after the process groups were built.
    """
    bridge = AttentionBridge(state)
    return [
        Patch(
            f"{DOT_PRODUCT}.__init__",
            _lift_assert(state),
            "the local attention refuses context_parallel_size above 1, multi-latent attention and, in 0.12, sliding "
            "windows",
        ),
        Patch(
            f"{DOT_PRODUCT}.forward",
            _dot_product_forward(bridge),
            "attention over the whole sequence, of which each rank holds a part",
        ),
        Patch(
            f"{TE_DOT_PRODUCT}.__init__",
            keep_arguments(bridge),
            "Transformer Engine's module does not keep the softmax scale that it was built with",
            _without_te,
        ),
        Patch(
            f"{TE_DOT_PRODUCT}.forward",
            _te_forward(bridge),
            "Transformer Engine would run its own context parallelism (not verified on hardware)",
            _without_te,
        ),
        Patch(
            f"{PARALLEL_STATE}.initialize_model_parallel",
            _initialize(state, announce),
            "the process groups of context parallelism are built from Megatron's",
        ),
        Patch(
            f"{PARALLEL_STATE}.destroy_model_parallel",
            _destroy(state),
            "the process groups of context parallelism go with Megatron's",
        ),
        *(
            Patch(
                f"{PARALLEL_STATE}.{name}",
                lambda original, name=name: original or getattr(process_groups, name),
                "code written for MindSpeed asks Megatron's parallel state for its groups",
                create=True,
            )
            for name in process_groups.GETTERS
        ),
        Patch(
            f"{TRANSFORMER_CONFIG}.__post_init__",
            _take_comm_type(state, announce),
            "cp_comm_type of a model's configuration names the algorithm where no flag and no framework does",
        ),
        *batch_patches(state),
        *model_patches(state),
        *pipeline_patches(state),
        *dynamic_patches(),
        *recompute_patches(state),
        *mtp_patches(state),
        *rope_patches(state),
        *expert_patches(state),
        *mamba_patches(state),
    ]


def _without_te():
    try:
        found = importlib.util.find_spec("transformer_engine") is not None
    except ValueError:  # a stub without a spec in sys.modules
        found = False
    return "" if found else "Transformer Engine is not installed"


def _lift_assert(state):
    def build(original):
        known = inspect.signature(original).parameters

        @wraps(original)
        def __init__(self, config, *args, **kwargs):
            # Multi-latent attention names its head sizes; only Transformer Engine's module takes them.
            kwargs = {
                name: value
                for name, value in kwargs.items()
                if name in known or name not in ("k_channels", "v_channels")
            }
            if config.context_parallel_size == 1:
                original(self, config, *args, **kwargs)
                return
            # The checks read a copy; everything later reads the real configuration.
            checked = copy.copy(config)
            checked.context_parallel_size, checked.window_size = 1, None
            original(self, checked, *args, **kwargs)
            self.config = config

        return __init__

    return build


def _dot_product_forward(bridge):
    def own_can(module, value, packed_seq_params):
        """Megatron's local attention knows neither packed sequences nor the value heads of multi-latent attention."""
        width = module.num_attention_heads_per_partition * value.shape[-1]
        return packed_seq_params is None and width == module.hidden_size_per_partition

    def described(module, query, attn_mask_type):
        # Query-key layer scaling divides, then multiplies.
        scale = module.softmax_scale * (module.scale_mask_softmax.scale or 1)
        return _described(module, module.attn_mask_type, scale, module.attention_dropout.p)

    return _attention_forward(bridge, own_can, described)


def _te_forward(bridge):
    def described(module, query, attn_mask_type):
        asked = module.asked_softmax_scale
        scale = query.shape[-1] ** -0.5 if asked is None else asked
        return _described(module, attn_mask_type, scale, module.asked_dropout)

    # Transformer Engine reads no mask with causal types.
    return _attention_forward(bridge, lambda *_: True, described, causal_types_read_the_mask=False)


def _attention_forward(bridge, own_can, described, causal_types_read_the_mask=True):
    """Builds the forward of one of Megatron's core attention modules.

    Args:
        own_can: (module, value, packed_seq_params) -> whether the original computes it without context parallelism.
        described: (module, query, attn_mask_type) -> CoreAttention.
    """

    def build(original):
        attend = outside_compiler(bridge.__call__)

        @wraps(original)
        def forward(
            self,
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=None,
            attention_bias=None,
            packed_seq_params=None,
            **kwargs,
        ):
            asked = {"attn_mask_type": attn_mask_type, "attention_bias": attention_bias, **kwargs}
            if (
                self.config.context_parallel_size == 1
                and not bridge.is_dynamic
                and own_can(self, value, packed_seq_params)
            ):
                packed = {"packed_seq_params": packed_seq_params}
                return original(self, query, key, value, attention_mask, **asked, **packed)
            _refuse_bias(attention_bias)
            if not causal_types_read_the_mask and attn_mask_type.name in CAUSAL_TYPES:
                attention_mask = None
            core = described(self, query, attn_mask_type)
            return attend(core, query, key, value, attention_mask, packed_seq_params, **asked)

        forward.exchanges_context_parallel = True  # UlyssesContextAttention around it must not exchange again
        return forward

    return build


def _refuse_bias(attention_bias):
    if attention_bias is not None:
        raise ValueError(
            "attention_bias is not supported with context parallelism; leave it out, or use --context-parallel-size 1."
        )


def _described(module, attn_mask_type, softmax_scale, dropout_p):
    """The CoreAttention of one of Megatron's modules."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    config = module.config
    skip_freq = getattr(config, "window_attn_skip_freq", None)  # absent before 0.15
    return CoreAttention(
        layer_number=module.layer_number,
        causal=attn_mask_type.name in CAUSAL_TYPES,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p if module.training else 0.0,
        window=layer_window(config.window_size, skip_freq, module.layer_number),
        softmax_offset=getattr(module, "softmax_offset", None),  # absent before 0.15
        # With sequence parallelism Megatron is inside the fork already.
        rng=nullcontext if config.sequence_parallel else get_cuda_rng_tracker().fork,
    )


def _initialize(state, announce):
    def build(original):
        from megatron.core import parallel_state

        signature = inspect.signature(original)

        @wraps(original)
        def initialize_model_parallel(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            config, dynamic = agreed_config(state, given), given.get("hybrid_context_parallel")
            if dynamic:
                check_launch(given)
            original(*args, **kwargs)
            minutes = given.get("distributed_timeout_minutes")
            timeout = timedelta(minutes=minutes) if minutes else None
            if dynamic:
                state.sizes = build_sizes(config, state.setup, timeout)
                announce(state.sizes[max(state.sizes)][0])
                # All of these ranks share the sub-batches out among them, whatever the sizes.
                state.measure(config, parallel_state.get_data_parallel_group(with_context_parallel=True))
            if config.context_parallel_size == 1:
                return
            state.build_groups(
                config,
                ranks_of_all(parallel_state.get_context_parallel_group()),
                timeout,
                parallel_state.get_context_parallel_group(),
                virtual_pipeline=(given.get("virtual_pipeline_model_parallel_size") or 1) > 1,
                buffers=hccl_buffers(config, state.setup),
            )
            state.is_pipeline = given.get("pipeline_model_parallel_size", 1) > 1
            if not dynamic:
                announce(config)
                state.measure(config, parallel_state.get_context_parallel_group())

        return initialize_model_parallel

    return build


def _destroy(state):
    def build(original):
        @wraps(original)
        def destroy_model_parallel(*args, **kwargs):
            state.destroy_groups()
            return original(*args, **kwargs)

        return destroy_model_parallel

    return build


def _take_comm_type(state, announce):
    def build(original):
        @wraps(original)
        def __post_init__(self):
            original(self)
            if take_comm_type(state, self.cp_comm_type, self.context_parallel_size):
                announce(state.config)

        return __post_init__

    return build
