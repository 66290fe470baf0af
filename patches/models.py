"""Patches that tell a model which micro-batch it is given, before any layer runs."""

from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from mindspeed_cp.patches.dynamic import check_model, sub_batch_record
from mindspeed_cp.patches.manager import Patch

from mindspeed_cp.megatron.handover import HandOver
from mindspeed_cp.megatron.packed import packed_batch
from mindspeed_cp.megatron.records import MicroBatch

LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module.LanguageModule"


def model_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{LANGUAGE_MODULE}.__call__",
            with_record(state),
            "a forward pass uses the layout and the documents of its own batch, found by the tensors it is given",
            inherited=True,
        )
    ]


def with_record(state):
    """Builds a model's call that runs with the record of its own batch, on every stage of a pipeline."""

    def build(original):
        hand_over = HandOver(state)

        @wraps(original)
        def call(self, *args, **kwargs):
            if state.alone:
                return original(self, *args, **kwargs)
            values = (*args, *kwargs.values())
            refuse_inference(values)
            if state.sizes:
                check_model(self)
                record = sub_batch_record(state, values)
                with state.running(record):
                    output = original(self, *args, **kwargs)
                state.records.remember(_tensors(output), record)
                return output
            record = hand_over(self, record_of(state, args, kwargs) or state.active, values)
            with state.running(record):
                output = original(self, *args, **kwargs)
            if record is not None:
                state.records.remember(_tensors(output), record)  # logits: state().gather_sequence finds them
            return output

        return call

    return build


def record_of(state, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch | None:
    """The record of the batch whose tensors are among the arguments of a model, None when no tensor leads to one.

    Raises:
        ValueError: tensors of different batches, or a packed batch that contradicts itself.
    """
    values = (*args, *kwargs.values())
    record = state.records.find(values)
    params = packed_params_in(values)
    if params is None:
        return record
    named = dict(zip(("input_ids", "position_ids"), args)) | kwargs
    tokens = named.get("input_ids")
    return packed_batch(state, params, None if tokens is None else tokens.size(-1), named.get("position_ids"), record)


def packed_params_in(values: Iterable[Any]) -> Any:
    """The PackedSeqParams in thd among the arguments of a model or a block, None without."""
    return next((value for value in values if getattr(value, "qkv_format", None) == "thd"), None)


def refuse_inference(values) -> None:
    """Raise when Megatron's inference contexts are among the arguments of a model or a block."""
    for value in values:
        if type(value).__module__.startswith("megatron.core.inference") or type(value).__name__ == "InferenceParams":
            raise ValueError(
                f"{type(value).__name__}: generation with Megatron's inference contexts is not supported with context "
                "parallelism, whose ranks hold parts of a sequence; use --context-parallel-size 1 to generate."
            )


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
