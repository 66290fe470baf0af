"""Patches of Megatron's core attention modules: attention over the whole sequence, of which each rank holds a part.

A module computes over the context-parallel group that it was built with. If context_parallel_size is 1 in its own
configuration, Megatron's original runs, whatever groups the process has. The exceptions are inputs that Megatron's
local module rejects: packed sequences, and the value heads of multi-latent attention.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from mindspeed_cp.attention.exchanged import exchange_around
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.alone import Scores, alone, memory_of
from mindspeed_cp.megatron.bridge import CoreAttention, attention, layer_window
from mindspeed_cp.megatron.latents import marked
from mindspeed_cp.megatron.layer_numbers import number_of
from mindspeed_cp.megatron.neighbour import is_here, is_wrapped
from mindspeed_cp.megatron.scopes import OWN, HeldGroup, group_of
from mindspeed_cp.patches.machine.compiler import outside_compiler
from mindspeed_cp.patches.owners import at_path
from mindspeed_cp.patches.rows import arguments_of, patch, signature_of, uninstalled
from mindspeed_cp.settings.notices import warn_rank0

DOT_PRODUCT = "megatron.core.transformer.dot_product_attention.DotProductAttention"
TE_DOT_PRODUCT = "megatron.core.extensions.transformer_engine.TEDotProductAttention"
CAUSAL_TYPES = ("causal", "padding_causal", "causal_bottom_right")  # of AttnMaskType; as many queries as keys
WITHOUT_TE = uninstalled("transformer_engine", "Transformer Engine is not installed")


def without_te() -> str:
    """Why Transformer Engine's module is not patched: it does not exist, or is MindSpeed's local module as well."""
    found = at_path(TE_DOT_PRODUCT)
    if found is at_path(DOT_PRODUCT):
        return "MindSpeed has one class for this and the local module"
    return "" if isinstance(found, type) and is_wrapped(found) else WITHOUT_TE()


# Field of TransformerConfig -> (the user's name of it, why it cannot be supported here).
REFUSED = {
    "fp8_dot_product_attention": (
        "fp8_dot_product_attention of the model's configuration",
        "attention is computed in the type of its tensors",
    ),
    "fp8_multi_head_attention": (
        "fp8_multi_head_attention of the model's configuration",
        "attention is computed in the type of its tensors",
    ),
    "qk_clip": ("--qk-clip", "attention does not return its largest logit"),
    "log_max_attention_logit": ("--log-max-attention-logit", "attention does not return its largest logit"),
}


@patch(
    f"{DOT_PRODUCT}.__init__",
    reason="the local attention refuses context_parallel_size above 1, multi-latent attention and, in 0.12, sliding "
    "windows; what it is built with says over which group it computes",
)
def local_init(
    adaptor: Adaptor, original: Callable[..., None], self: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    # Multi-latent attention passes its head dimensions, which only Transformer Engine's module accepts.
    known = signature_of(original).parameters
    kwargs = {
        name: value for name, value in kwargs.items() if name in known or name not in ("k_channels", "v_channels")
    }
    if config.context_parallel_size == 1:
        original(self, config, *args, **kwargs)
        return
    given = arguments_of(original, (self, config, *args), kwargs)
    group = group_of(given, config.context_parallel_size, type(self).__name__)
    # The constructor's checks read a copy; later code reads the real configuration.
    checked = copy.copy(config)
    checked.context_parallel_size, checked.window_size = 1, None
    original(self, checked, *args, **kwargs)
    self.config = config
    _join(adaptor, self, group)


@patch(
    f"{TE_DOT_PRODUCT}.__init__",
    reason="Transformer Engine's module does not keep the softmax scale that it was built with",
    when=without_te,
)
def te_init(adaptor: Adaptor, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    given = arguments_of(original, (self, *args), kwargs)
    config, dropout = given["config"], given.get("attention_dropout")
    if config.context_parallel_size > 1 or adaptor.sizes:
        _refuse_unsupported(config)
    if config.context_parallel_size > 1 and is_wrapped(type(self)):
        args, kwargs = _alone(config, args, kwargs)  # else MindSpeed's module uses its own context parallelism
    original(self, *args, **kwargs)
    self.config = config
    self.asked_softmax_scale = given.get("softmax_scale")
    self.asked_dropout = config.attention_dropout if dropout is None else dropout
    if config.context_parallel_size > 1:
        _join(adaptor, self, group_of(given, config.context_parallel_size, type(self).__name__))


def _alone(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with context-parallel size 1 in the configuration."""
    alone = copy.copy(config)
    alone.context_parallel_size = 1
    shown = tuple(alone if value is config else value for value in args)
    return shown, {name: alone if value is config else value for name, value in kwargs.items()}


def _join(adaptor: Adaptor, module: Any, group: Any) -> None:
    """Let ``module`` compute over ``group``."""
    object.__setattr__(module, OWN, HeldGroup(group))  # bypasses nn.Module, since it is neither parameter nor state
    adaptor.announce(adaptor.scopes.of(group).config)


def _refuse_unsupported(config: Any) -> None:
    for field, (name, why) in REFUSED.items():
        if getattr(config, field, False):
            raise ValueError(
                f"{name} is not supported with context parallelism, where {why}; leave it out, or use "
                "--context-parallel-size 1."
            )


class _Call:
    """What a core attention of Megatron's is called with; ``asked`` is what no computation here is told by name."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> None:
        self.tensors, self.attention_mask, self.packed_seq_params = (
            (query, key, value),
            attention_mask,
            packed_seq_params,
        )
        self.attn_mask_type, self.attention_bias = attn_mask_type, attention_bias
        self.asked = {"attn_mask_type": attn_mask_type, "attention_bias": attention_bias, **others}


@patch(f"{DOT_PRODUCT}.forward", reason="attention over the whole sequence, of which each rank holds a part")
def local_forward(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    call = _Call(*args, **kwargs)
    query, key, value = call.tensors
    # Megatron's local attention supports neither packed sequences nor the value heads of multi-latent attention.
    width = self.num_attention_heads_per_partition * value.shape[-1]
    theirs = call.packed_seq_params is None and width == self.hidden_size_per_partition and not _is_limited(adaptor)
    if _is_alone(self) and not adaptor.sizes and theirs:
        if not _takes_the_kernel(adaptor, query, key, call.attention_bias):
            return original(self, *args, **kwargs)
    # Query-key layer scaling first divides and then multiplies by the same factor.
    scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
    return _attended(adaptor, self, _described(self, self.attn_mask_type, scale, self.attention_dropout.p), call)


@patch(
    f"{TE_DOT_PRODUCT}.forward",
    reason="Transformer Engine would run its own context parallelism (not verified on hardware)",
    when=without_te,
)
def te_forward(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if _is_alone(self) and not adaptor.sizes and not _is_limited(adaptor):
        return original(self, *args, **kwargs)
    call = _Call(*args, **kwargs)
    head_dim = call.tensors[0].shape[-1]
    scale = head_dim**-0.5 if self.asked_softmax_scale is None else self.asked_softmax_scale
    core = _described(self, call.attn_mask_type, scale, self.asked_dropout)
    if call.attn_mask_type.name in CAUSAL_TYPES and not is_wrapped(type(self)):
        call.attention_mask = None  # with causal types Transformer Engine ignores it, but MindSpeed's module reads it
    return _attended(adaptor, self, core, call)


# Marks them, so that UlyssesContextAttention around one of them does not exchange again.
local_forward.function.exchanges_context_parallel = True  # type: ignore[attr-defined]
te_forward.function.exchanges_context_parallel = True  # type: ignore[attr-defined]


def _takes_the_kernel(adaptor: Adaptor, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether --use-flash-attn selects this project's kernel here; else one notice tells what plain attention costs."""
    if is_here():  # then it selects MindSpeed's attention, which is in place
        return False
    computable = len(query) == len(key) and bias is None
    choice = alone(
        Scores.of(query, key),
        asked=adaptor.settings.asked_for_flash,
        device=query.device.type,
        packed=False,
        memory=memory_of(query.device),
        refusal="" if computable else "queries and keys differ in length, or have a bias",
    )
    if choice.line:
        warn_rank0(choice.line)
    return choice.fused


def _is_alone(module: Any) -> bool:
    return bool(module.config.context_parallel_size == 1)


def _is_limited(adaptor: Adaptor) -> bool:
    """Whether the record of the batch that runs says what its tokens see."""
    return adaptor.active is not None and adaptor.active.limits_attention


def _has_slices(adaptor: Adaptor) -> bool:
    """Whether the current batch has attention slices."""
    return adaptor.active is not None and adaptor.active.slices is not None


def _attended(adaptor: Adaptor, module: Any, core: CoreAttention, call: _Call) -> torch.Tensor:
    query, key, _ = call.tensors
    if call.attention_bias is not None:
        raise ValueError(
            "attention_bias is not supported with context parallelism; leave it out, or use --context-parallel-size 1."
        )
    if getattr(module, "attention_type", "self") == "cross" and _has_slices(adaptor):
        raise ValueError(
            f"cross attention of layer {module.layer_number} runs in a batch with slices, which say what tokens of one "
            "sequence see of it; leave attention_slices, prefix_lengths and image_token_id out."
        )
    active = adaptor.active
    scope = active.scope if adaptor.sizes and active is not None and active.scope else adaptor.scope_of(module)
    if getattr(module, "attention_type", "self") == "cross" and not scope.alone and len(key) != len(query):
        raise ValueError(
            f"cross attention of layer {module.layer_number} has {len(query)} queries and {len(key)} keys on this "
            "rank, and context parallelism needs equal lengths, split alike; pad both to one length, or use "
            "--context-parallel-size 1."
        )
    around = None if scope.alone else exchange_around(module)
    how = call.attention_mask, call.packed_seq_params, call.asked, around
    return attend()(adaptor, scope, core, *call.tensors, *how)


@cache
def attend() -> Callable[..., torch.Tensor]:
    """``attention`` with a graph break for torch.compile."""
    return outside_compiler(attention)


def _described(module: Any, attn_mask_type: Any, softmax_scale: float, dropout_p: float) -> CoreAttention:
    """A CoreAttention that describes one of Megatron's modules."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    config, latents = module.config, marked(module)
    skip_freq = getattr(config, "window_attn_skip_freq", None)  # absent before 0.15
    return CoreAttention(
        layer_number=number_of(module),
        causal=attn_mask_type.name in CAUSAL_TYPES,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p if module.training else 0.0,
        window=layer_window(config.window_size, skip_freq, module.layer_number),
        softmax_offset=getattr(module, "softmax_offset", None),  # absent before 0.15
        expand=None if latents is None else latents.expansion,
        # With sequence parallelism Megatron has already entered the fork.
        rng=nullcontext if config.sequence_parallel else get_cuda_rng_tracker().fork,
    )
