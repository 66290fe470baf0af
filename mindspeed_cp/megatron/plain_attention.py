"""Modules with Megatron's own attention, which builds the scores of every query with every key on an NPU: encoders,
layers that are not split, cross attention."""

import re
from collections import Counter
from collections.abc import Iterator

import torch

from mindspeed_cp.settings.notices import warn_rank0

LOCAL = "megatron.core.transformer.dot_product_attention.DotProductAttention"
# Classes that build scores; --use-flash-attn affects only the first.
PLAIN = (
    LOCAL,
    "megatron.core.models.audio.nemo_transformer_encoder.MultiHeadAttention",
    "megatron.core.transformer.experimental_attention_variant.dsa.DSAttention",
)


def name_plain_attention(model: torch.nn.Module, *, asked: bool) -> None:
    """Print once on rank 0 which modules of ``model`` build scores on an NPU.

    Args:
        asked: whether --use-flash-attn was given, so that this project's kernel computes local self attention.
    """
    if not _is_on_npu(model):
        return
    found = list(_plain_modules(model))
    helped = [path for path, is_helped in found if is_helped]
    left = Counter(path for path, is_helped in found if not (is_helped and asked))
    if not left:
        return
    modules = ", ".join(f"{path} ({number})" for path, number in left.items())
    way_out = ""
    if helped and not asked:
        way_out = " --use-flash-attn computes self attention of DotProductAttention by the fused kernel, without them."
    warn_rank0(
        f"attention in {type(model).__name__} that is computed on each rank alone, beside context parallelism, builds "
        f"the scores of every query with every key, queries x keys numbers for each head: {modules}.{way_out}"
    )


def _plain_modules(model: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    """Yield (path with * for the layer number, whether --use-flash-attn would select the kernel) of such modules."""
    for path, module in model.named_modules():
        names = {f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__}
        size = getattr(getattr(module, "config", None), "context_parallel_size", 1)
        if size == 1 and not names.isdisjoint(PLAIN):
            is_self = getattr(module, "attention_type", "self") != "cross"
            yield re.sub(r"\b\d+\b", "*", path) or type(module).__name__, LOCAL in names and is_self


def _is_on_npu(model: torch.nn.Module) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.device.type == "npu"
