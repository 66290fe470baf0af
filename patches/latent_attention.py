"""Patches of multi-latent attention: ranks may exchange the latent and compute keys and values from it themselves."""

from collections.abc import Callable
from typing import Any

import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.latents import ENDS, HOLDS_BACK, latents_of, mark, marked
from mindspeed_cp.patches.attention import WITHOUT_TE
from mindspeed_cp.patches.rows import absent, arguments_of, patch

LATENT = "megatron.core.transformer.multi_latent_attention"
TE = "megatron.core.extensions.transformer_engine"
VALUE = f"{LATENT}._prepare_mla_core_attention_value"


@patch(
    f"{LATENT}.MLASelfAttention.get_query_key_value_tensors",
    reason="the latent is sent if that is worth computing keys and values on every rank",
)
def query_key_value(adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.config.context_parallel_size > 1:
        given = arguments_of(original, (self, *args), kwargs)
        infers = given.get("inference_context") is not None or given.get("inference_params") is not None
        # The mark is not removed: recomputation projects up again, and core attention may be recomputed too.
        mark(self, None if infers else latents_of(adaptor, self))
    return original(self, *args, **kwargs)


HELD_BACK = "keys and values are computed from the latent after it was sent"


@patch("megatron.core.tensor_parallel.layers.ColumnParallelLinear.forward", reason=HELD_BACK)
def up_projection(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    latents = marked(self)
    return original(self, input_, *args, **kwargs) if latents is None else (latents.held_back(input_), None)


@patch(
    f"{TE}.TEColumnParallelLinear.forward",
    f"{TE}.TELayerNormColumnParallelLinear.forward",
    reason=HELD_BACK,
    when=WITHOUT_TE,
    inherited=True,
)
def te_up_projection(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, x: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    latents = marked(self)
    return original(self, x, *args, **kwargs) if latents is None else (latents.held_back(x), None)


setattr(query_key_value.function, ENDS, True)
setattr(up_projection.function, HOLDS_BACK, True)
setattr(te_up_projection.function, HOLDS_BACK, True)


@patch(
    VALUE,
    reason="the latent is not yet a value, and Megatron pads values to the width of keys for packed sequences",
    when=absent(VALUE, "this version leaves values as they are"),
)
def core_attention_value(
    adaptor: Adaptor, original: Callable[..., Any], module: Any, query: torch.Tensor, value: Any, *args: Any
) -> Any:
    if marked(module.core_attention) is None:
        return original(module, query, value, *args)
    return value, False, value.shape[-1], value.shape[-1]
