"""Find the record of a forward pass that enters a model, of a block of layers, or of a single module.

If this project split the batch, the record is found by the batch's tensors; if somebody else did, it is made from the
batch itself (position ids, packed boundaries, a declaration). It may also come from the first pipeline stage or from
``Adaptor.running``. Nothing is guessed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.later_stages import pipeline_of
from mindspeed_cp.megatron.packed import packed_batch
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import Scope, collective_device
from mindspeed_cp.megatron.splitting import divided_by
from mindspeed_cp.settings.notices import warn_rank0

if TYPE_CHECKING:
    from mindspeed_cp.megatron.known import Known as Adaptor

# Argument names in forward methods; the last ones are those of legacy models.
IDS, TOKENS = ("position_ids", "enc_position_ids"), ("input_ids", "tokens", "decoder_input_ids", "enc_input_ids")


def entering(adaptor: "Adaptor", model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch | None:
    """The record with which ``model`` runs this forward pass; None if the model is not split.

    Raises:
        ValueError: nothing says how its batch was split, or this information contradicts the model or itself.
    """
    values = (*args, *kwargs.values())
    scope = adaptor.scope_of(model)
    found = adaptor.records.find(values)
    given = named_arguments(model, args, kwargs)
    ids, tokens = _first(given, IDS), _first(given, TOKENS)
    if found is None and not scope.alone and adaptor.running_in(scope) is None:
        found = adaptor.records.find_copied([tokens, given.get("labels")], scope)
    params = packed_params_in(values)
    if scope.alone:
        found = found or adaptor.records.copied_from(tokens)
        return _alone(adaptor, model, found, given.get("attention_mask") is not None, params is not None)
    refuse_inference(values)
    if found is not None and found.scope is not None and found.scope is not scope:
        raise ValueError(
            f"{type(model).__name__} computes over {scope.size} context-parallel ranks, and its batch was split over "
            f"the {found.scope.size} ranks {list(found.scope.groups.global_ranks)}; split it over the group "
            "of the model (cp_group of get_batch_on_this_cp_rank)."
        )
    record = found or adaptor.running_in(scope)
    length = _length_of(model, given, tokens, ids)
    if params is not None:
        adaptor.handed.waiting = False  # the parameters contain the same, and also the padding of documents
        _check_packed_slices(adaptor, model, record, found is None and adaptor.active is None)
        return packed_batch(adaptor, scope, params, length, ids, record)
    if getattr(model, "pre_process", True):
        if record is None:
            record = adaptor.foreign.record(adaptor, scope, ids, tokens, declared(adaptor, scope, model), length)
        record = with_handed_documents(adaptor, record, tokens, ids)
        if found is None and adaptor.active is None:
            if record.documents is None and adaptor.documents_by_hand:
                raise ValueError(f"{BY_HAND}{LOST}")
            if adaptor.sliced:
                raise ValueError(f"{SLICED}{LOST}")
        return adaptor.hand_over.first(model, scope, record)
    return adaptor.hand_over.later(model, scope, record)


def _length_of(
    model: Any, given: Mapping[str, Any], tokens: torch.Tensor | None, ids: torch.Tensor | None
) -> int | None:
    """How many tokens this rank holds: rows of decoder_input, beside which tokens may be the whole sequence; else what
    the model got of tokens or position ids; None for nothing.
    """
    rows = given.get("decoder_input")
    if isinstance(rows, torch.Tensor):
        return rows.size(0) * (model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1)
    told = ids if tokens is None else tokens
    return None if told is None else told.size(-1)


def _check_packed_slices(adaptor: "Adaptor", model: Any, record: MicroBatch | None, is_lost: bool) -> None:
    """Raise ValueError if slices would be lost, because packed_seq_params describe only documents."""
    if adaptor.sliced and is_lost and getattr(model, "pre_process", True):
        raise ValueError(f"{SLICED}{LOST}")
    if record is not None and record.slices is not None and len(pipeline_of(model)) > 1:
        raise ValueError(
            "a batch with slices (attention_slices, prefix_lengths, image_token_id) and packed_seq_params runs in "
            "pipeline stages, which take packed_seq_params for all that is said of it; leave packed_seq_params out "
            "and give the documents when the batch is split (state().shard_batch(batch, cu_seqlens=...)), or use "
            "--pipeline-model-parallel-size 1."
        )


SLICED, BY_HAND = "batches come with slices", "documents were given by hand (set_actual_seq_len, cu_seqlens)"
LOST = (
    ", and the tokens of this forward pass belong to no batch that was split; give the model the tensors that "
    "get_batch_on_this_cp_rank or shard_batch returned, or run it inside state().running(record)."
)


def _alone(adaptor: "Adaptor", model: Any, found: MicroBatch | None, masked: bool, packed: bool) -> MicroBatch | None:
    """The record of a model without context parallelism if it limits what tokens see; else None (Megatron's code runs).

    Args:
        masked, packed: the model got an attention_mask, packed_seq_params, which contain the documents.
    """
    if found is not None and found.layout.cp_size > 1:
        raise ValueError(
            f"{type(model).__name__} has context_parallel_size 1 in its configuration, and its batch was split over "
            f"{found.layout.cp_size} ranks; give its TransformerConfig the same size, or pass it whole batches."
        )
    if found is None and adaptor.active is None and adaptor.sliced and not masked and not adaptor.scopes and not packed:
        raise ValueError(f"{BY_HAND if adaptor.documents_by_hand else SLICED}{LOST}")
    if found is None or not found.limits_attention or (found.slices is None and (masked or packed)):
        return None
    if len(pipeline_of(model)) > 1:
        said = "documents of its own (cu_seqlens)"
        if found.slices is not None:
            said = "slices (attention_slices, prefix_lengths, image_token_id)"
        raise ValueError(
            f"a batch with {said} needs --context-parallel-size above 1 where there are pipeline stages, which "
            "otherwise do not get them; use --pipeline-model-parallel-size 1, or context parallelism."
        )
    return found


def with_handed_documents(
    adaptor: "Adaptor", record: MicroBatch, tokens: torch.Tensor | None, ids: torch.Tensor | None
) -> MicroBatch:
    """``record`` with the documents that were passed separately, if its batch contains none."""
    handed = adaptor.handed
    if handed.ends is None or record.waits_since is None:
        return record
    if handed.of_a_split and record.waits_since < handed.times:
        raise ValueError(
            "set_actual_seq_len was called after this batch was split, and another batch, split since, took the ends: "
            "it is unknown which batch they belong to; set them before each batch is split (the whole row as one "
            "document where it is one), or give them to state().shard_batch(batch, cu_seqlens=...)."
        )
    told = ids if tokens is None else tokens
    rows = 1 if told is None or told.dim() < 2 else told.size(-2)
    return replace(record, documents=handed.take(rows, record.seq_len, divided_by(adaptor)), waits_since=None)


def declared(adaptor: "Adaptor", scope: Scope, model: Any) -> str:
    """How others split whole rows according to the settings, "" if nothing was declared."""
    if scope.config.batch_layout in ("zigzag", "contiguous"):
        return scope.config.batch_layout
    mode = getattr(model.config, "cp_partition_mode", None)
    return mode if mode in ("zigzag", "contiguous") else adaptor.settings.declared or ""


def named_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """name -> argument of a model's forward."""
    known = _forward_of(type(model).forward)
    try:
        return known.bind_partial(model, *args, **kwargs).arguments
    except TypeError:  # the call itself will raise the error
        return kwargs


@cache
def _forward_of(forward: Any) -> Signature:
    return signature(forward)


def _first(given: Mapping[str, Any], names: Iterable[str]) -> torch.Tensor | None:
    return next((given[name] for name in names if isinstance(given.get(name), torch.Tensor)), None)


def block_record(adaptor: "Adaptor", scope: Scope, config: Any, num_rows: int, params: Any = None) -> MicroBatch:
    """The record of the micro-batch that enters a block of layers.

    Args:
        config: TransformerConfig.
        num_rows: first dimension of the block's input, which sequence parallelism has split further.
        params: PackedSeqParams in thd, None for whole sequences.
    """
    local_len = num_rows * config.tensor_model_parallel_size if config.sequence_parallel else num_rows
    return record_of_length(adaptor, scope, local_len, params)


def record_of_length(adaptor: "Adaptor", scope: Scope, local_len: int, params: Any = None) -> MicroBatch:
    """The record of the code running over ``scope``, for which this rank holds ``local_len`` tokens.

    Later pipeline stages whose first stage passes nothing on, and modules outside a language model, have no record.
    They use the configuration's layout for the ranks' total length. Whether ranks exchange their lengths depends only
    on the running code, so all ranks of the group do it together.

    Args:
        params: PackedSeqParams in thd, which are used where there is no record; None for whole sequences.

    Raises:
        ValueError: the record, or the layout, gives this rank another number of tokens.
    """
    record = adaptor.running_in(scope)
    if record is None and params is not None:
        return packed_batch(adaptor, scope, params, local_len)
    if record is None:
        if not adaptor.is_pipeline:
            warn_rank0(
                "layers run outside a model that mindspeed_cp knows: each rank is assumed to hold its part in the "
                f"layout of the configuration ({scope.config.layout_kind}, state().layout(length).positions(rank)); "
                "run them inside state().running(record) to say otherwise."
            )
        total = torch.tensor([local_len], device=collective_device(scope.group))
        dist.all_reduce(total, group=scope.group)
        record = MicroBatch(adaptor.layout(int(total), scope=scope), None, scope)
    expected = record.layout.length(scope.rank)
    if expected != local_len:
        raise ValueError(
            f"context-parallel rank {scope.rank} holds {local_len} tokens, and a sequence of {record.seq_len} "
            f"gives it {expected} (layout {record.layout.kind}); split every batch with get_batch_on_this_cp_rank "
            "or state().shard_batch, and pass the same length to all ranks."
        )
    return record


def placed(record: MicroBatch, adaptor: "Adaptor") -> MicroBatch:
    """``record`` with a scope; without one it belongs to Megatron's own group."""
    return record if record.scope is not None else replace(record, scope=adaptor.main)


def record_of_part(adaptor: "Adaptor", tensor: torch.Tensor, of: Any, dim: int) -> MicroBatch:
    """The record of the batch to which a part of a sequence belongs; see ``Adaptor.gather_sequence``."""
    values = of.values() if isinstance(of, Mapping) else (tensor if of is None else of,)
    if getattr(of, "qkv_format", None) == "thd":
        return placed(packed_batch(adaptor, adaptor.current, of, tensor.size(dim)), adaptor)
    record = adaptor.records.find(values) or adaptor.active
    if record is None:
        raise ValueError(
            "nothing says how the batch of this tensor was split; pass of=, the local tokens, the output of the "
            "model, or the PackedSeqParams."
        )
    return placed(record, adaptor)


def scope_of_part(adaptor: "Adaptor", of: Any) -> Scope:
    """The ranks over which the batch of ``of`` was split; see ``Adaptor.gather_sequence``."""
    if getattr(of, "qkv_format", None) == "thd":
        return adaptor.current
    found = adaptor.records.find(of.values() if isinstance(of, Mapping) else (of,))
    return adaptor.current if found is None or found.scope is None else found.scope


def packed_params_in(values: Iterable[Any]) -> Any:
    """The PackedSeqParams in thd among the arguments of a model or a block, or None."""
    return next((value for value in values if getattr(value, "qkv_format", None) == "thd"), None)


def refuse_inference(values: Iterable[Any]) -> None:
    """Raise ValueError if Megatron's inference contexts are among the arguments of a model or a block."""
    for value in values:
        if type(value).__module__.startswith("megatron.core.inference") or type(value).__name__ == "InferenceParams":
            raise ValueError(
                f"{type(value).__name__}: generation with Megatron's inference contexts is not supported with context "
                "parallelism, whose ranks hold parts of a sequence; use --context-parallel-size 1 to generate."
            )


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a model's output."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_in(item)
