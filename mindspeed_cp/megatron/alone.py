"""Attention without context parallelism: when the fused kernel computes it, and what plain attention costs.

Megatron's local attention builds the scores of every query with every key, regardless of --use-flash-attn. With
context-parallel size 1 the flag therefore selects this project's kernel where it matters. Without the flag Megatron's
own code runs, with identical results, and a line says what that costs. On an NPU, a model's modules with Megatron's own
attention (encoders, layers that are not split, cross attention) are named as well.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from mindspeed_cp.settings.notices import warn_rank0

LOCAL = "megatron.core.transformer.dot_product_attention.DotProductAttention"
# Classes that build scores; --use-flash-attn affects only the first.
PLAIN = (
    LOCAL,
    "megatron.core.models.audio.nemo_transformer_encoder.MultiHeadAttention",
    "megatron.core.transformer.experimental_attention_variant.dsa.DSAttention",
)
SHARE = 10  # scores above 1 / SHARE of the memory cause a notice or, with the flag, use of the kernel


class Scores(NamedTuple):
    """What plain attention builds in one layer: (batch, heads, queries, keys) in a dtype of ``itemsize`` bytes."""

    batch: int
    heads: int
    queries: int
    keys: int
    itemsize: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor) -> "Scores":
        """From query (queries, batch, heads, dim) and key (keys, batch, kv heads, dim); packed rows have no batch."""
        batch = query.shape[1] if query.dim() == 4 else 1
        return cls(batch, query.shape[-2], query.shape[0], key.shape[0], query.element_size())

    @property
    def num_bytes(self) -> int:
        return self.batch * self.heads * self.queries * self.keys * self.itemsize


class Alone(NamedTuple):
    """How attention without context parallelism is computed.

    Args:
        fused: whether this project's kernel computes it; else the module's own code, with its original arguments.
        line: a notice to print once on rank 0, or "".
    """

    fused: bool
    line: str = ""


def alone(scores: Scores, *, asked: bool, device: str, packed: bool, memory: int, refusal: str = "") -> Alone:
    """Decide which code computes attention with context-parallel size 1.

    Args:
        asked: whether the user wrote --use-flash-attn.
        device: "cpu", "cuda" or "npu".
        packed: whether the batch is one of packed documents (thd).
        memory: bytes of the device; see ``memory_of``.
        refusal: why the kernel cannot compute this call, "" if it can.

    Raises:
        ValueError: the scores exceed the device's memory, but only Megatron's own code may compute them.
    """
    large = scores.num_bytes * SHARE > memory
    wanted = asked and (device == "npu" or packed or large)
    if wanted and not refusal:
        return Alone(True)
    if scores.num_bytes > memory:
        way_out = "" if asked else "add --use-flash-attn, or "
        raise ValueError(f"{_cost(scores, memory)}; {way_out}split the sequence with --context-parallel-size.")
    cost = [_cost(scores, memory)] if large else []
    if wanted:
        return Alone(False, "; ".join([f"--use-flash-attn changes nothing here: {refusal}", *cost]) + ".")
    return Alone(False, "; ".join([*cost, "add --use-flash-attn."]) if large else "")


def _cost(scores: Scores, memory: int) -> str:
    return (
        f"Megatron's own attention builds {scores.num_bytes / 1e9:.1f} GB of scores in each layer (batch "
        f"{scores.batch}, {scores.heads} heads, {scores.queries} queries x {scores.keys} keys), and this device has "
        f"{memory / 1e9:.1f} GB; the fused kernel never builds them"
    )


@cache
def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; for the CPU, of the host."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(getattr(torch, device.type).get_device_properties(device).total_memory)


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
