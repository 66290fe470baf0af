"""Patches of the legacy models of a Megatron-LM checkout (--use-legacy-models)."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import entering, record_of_length, tensors_in
from mindspeed_cp.megatron.bridge import CoreAttention
from mindspeed_cp.patches.attention import attend
from mindspeed_cp.patches.checkout import LEGACY, without_legacy
from mindspeed_cp.patches.rows import patch

LEGACY_LANGUAGE = "megatron.legacy.model.language_model"


@patch(
    f"{LEGACY}.ParallelAttention.__init__",
    reason="legacy models would require the flash-attn package; the core attention below is flash attention",
    when=without_legacy,
)
def parallel_attention_init(
    adaptor: Adaptor, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any
) -> None:
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


@patch(
    f"{LEGACY}.CoreAttention.forward",
    reason="legacy models: attention over the whole sequence, of which each rank holds a part",
    when=without_legacy,
)
def core_attention(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    self: Any,
    query_layer: torch.Tensor,
    key_layer: torch.Tensor,
    value_layer: torch.Tensor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    if adaptor.main.alone:
        return original(self, query_layer, key_layer, value_layer, attention_mask)
    scale = (self.scale_mask_softmax.scale or 1) / self.norm_factor  # layer scaling divides, then multiplies
    core = CoreAttention(
        layer_number=self.layer_number,
        causal=self.attn_mask_type.name == "causal",
        softmax_scale=scale,
        dropout_p=self.attention_dropout.p if self.training else 0.0,
        rng=_dropout_rng(self),
    )
    return attend()(adaptor, adaptor.main, core, query_layer, key_layer, value_layer, attention_mask)


def _dropout_rng(module: Any) -> Any:
    """The random state of dropout, chosen as in the original."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return nullcontext if module.sequence_parallel else lambda: get_cuda_rng_tracker().fork()


@patch(
    f"{LEGACY}.ParallelTransformer.forward",
    reason="legacy models: layers learn the true length of the micro-batch",
    when=without_legacy,
)
def parallel_transformer(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, hidden_states: Any, *args: Any, **kwargs: Any
) -> Any:
    if adaptor.main.alone:
        return original(self, hidden_states, *args, **kwargs)
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size

    rows = (hidden_states if self.pre_process else self.input_tensor).size(0)
    local_len = rows * get_tensor_model_parallel_world_size() if self.sequence_parallel else rows
    with adaptor.running(record_of_length(adaptor, adaptor.main, local_len)):
        return original(self, hidden_states, *args, **kwargs)


@patch(
    f"{LEGACY_LANGUAGE}.TransformerLanguageModel.forward",
    reason="legacy models: a forward pass uses the layout and the documents of its own batch",
    when=without_legacy,
)
def language_model(adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if adaptor.main.alone:
        return original(self, *args, **kwargs)
    adaptor.forward_pass_begins()
    record = entering(adaptor, self, args, kwargs)
    adaptor.batch_begins(record)
    with adaptor.running(record):
        output = original(self, *args, **kwargs)
    if record is not None:
        adaptor.records.remember(tensors_in(output), record)
    return output
