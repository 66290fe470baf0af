"""Masks that are neither causal nor documents: slices that are part of the batch.

A batch contains them in one of three forms: ``attention_slices``, ``prefix_lengths``, or tokens for image patches
(``image_token_id``), which see each other inside causal text. With slices, ``rotary_position_ids`` (rows, seq) give the
positions for rotary embeddings, if a token's place in the row is not its position in its sequence; ``PackedTree.batch``
returns both.
"""

from collections.abc import Mapping
from operator import index
from typing import Any

import numpy as np
import torch

from mindspeed_cp.megatron.records import Documents, MicroBatch, Places, Slices, one_row_if_shared
from mindspeed_cp.sequence.masks import rows_of_slices
from mindspeed_cp.sequence.runs import Runs, join
from mindspeed_cp.sequence.slice_kinds import prefix_slices, span_slices
from mindspeed_cp.sequence.slice_mask import slices_mask

KEYS = ("attention_slices", "prefix_lengths")
ROTARY = "rotary_position_ids"
# Classes of models and layers with a recurrent state, and Megatron's names of such layers in a GPTModel
# (experimental_attention_variant).
WITH_STATES = {"MambaModel", "HybridModel", "MambaMixer", "GatedDeltaNet", "gated_delta_net"}
SPARSE = {"DSAttention", "dsa"}


def brings_slices(batch: Mapping[str, Any], image_token_id: int | None) -> bool:
    """Whether a batch contains slices in any form."""
    return image_token_id is not None or any(batch.get(key) is not None for key in KEYS)


def slices_of_batch(
    batch: Mapping[str, Any], documents: Documents | None, rows: int, seq_len: int, image_token_id: int | None
) -> tuple[Slices | None, Places | None]:
    """(slices, places) for a batch's record, each of them None if the batch has none.

    Args:
        rows, seq_len: those of the whole batch.
        image_token_id: as passed to ``configure``.

    Raises:
        ValueError: the batch contains several forms or also a mask, or slices do not fit the batch.
    """
    if batch.get(ROTARY) is not None and batch.get("attention_slices") is None:
        raise ValueError(f"the batch brings {ROTARY} without attention_slices; leave them out, or bring both.")
    if not brings_slices(batch, image_token_id):
        return None, None
    named = [key for key in KEYS if batch.get(key) is not None]
    if image_token_id is not None and "attention_slices" not in named:
        named.append("image_token_id")
    if batch.get("attention_mask") is not None:
        raise ValueError(
            f"the batch brings an attention_mask, and {named[0]} says what its tokens see; leave one of them out "
            "(--no-create-attention-mask-in-dataloader leaves out Megatron's own mask)."
        )
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} both say what the tokens of a batch see; leave one of them out.")
    if named[0] == "attention_slices":
        given = tuple(rows_of_slices(batch["attention_slices"], rows))
        for row in given:
            slices_mask(row, seq_len)
        return one_row_if_shared(given), _places(batch.get(ROTARY), rows, seq_len)
    shared: Documents = ((0, seq_len),) if documents is None else documents
    of_rows = shared * (rows // len(shared))
    if named[0] == "prefix_lengths":
        return one_row_if_shared(_prefixes(of_rows, batch["prefix_lengths"])), None
    tokens = batch.get("tokens", batch.get("input_ids"))
    if tokens is None:
        return None, None  # a later pipeline stage, which gets the record from the first one
    spans = map(_spans, (tokens == image_token_id).cpu())
    return one_row_if_shared(map(span_slices, of_rows, spans)), None


def _prefixes(of_rows: Documents, lengths: Any) -> Slices:
    rows = lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths
    try:
        given = [list(map(index, [row] if np.ndim(row) == 0 else row)) for row in rows]
    except TypeError:
        raise ValueError(
            f"prefix_lengths {lengths} of the batch must be a whole number for each row, or a list of them for each "
            "row, one for each of its documents."
        ) from None
    if len(given) != len(of_rows):
        raise ValueError(
            f"prefix_lengths of the batch are those of {len(given)} rows, and the batch has {len(of_rows)}; give each "
            "row a number, or one for each of its documents."
        )
    return tuple(map(prefix_slices, of_rows, given))


def _spans(chosen: torch.Tensor) -> Runs:
    """The runs of True in bool (seq,)."""
    return join((place, place + 1) for place in chosen.nonzero()[:, 0].tolist())


def _places(position_ids: torch.Tensor | None, rows: int, seq_len: int) -> Places | None:
    """Position ids (rows, seq) as runs; None if they count from 0 to the end.

    Raises:
        ValueError: they have another shape, or exceed the length for which rotary embeddings are made.
    """
    if position_ids is None:
        return None
    if not isinstance(position_ids, torch.Tensor) or position_ids.is_floating_point():
        kind = getattr(position_ids, "dtype", type(position_ids).__name__)
        raise ValueError(f"{ROTARY} are {kind}; pass a tensor ({rows}, {seq_len}) of whole numbers.")
    ids = position_ids.cpu()
    if tuple(ids.shape) != (rows, seq_len) or int(ids.min()) < 0 or int(ids.max()) >= seq_len:
        raise ValueError(
            f"{ROTARY} have shape {tuple(ids.shape)} and go from {int(ids.min())} to {int(ids.max())}; pass "
            f"({rows}, {seq_len}) numbers from 0 to {seq_len - 1}; let each sequence begin with 0, as only distances "
            "count."
        )
    found = []
    for row in ids.unique(dim=0):
        starts = [0, *((row[1:] != row[:-1] + 1).nonzero()[:, 0] + 1).tolist(), seq_len]
        found.append(tuple((int(row[a]), int(row[a]) + b - a) for a, b in zip(starts, starts[1:])))
    return None if found == [((0, seq_len),)] else tuple(found)


def check_layers(model: Any, record: MicroBatch) -> None:
    """Raise ValueError if layers of ``model`` ignore the slices of its batch, or assume that neighbouring rows are
    neighbouring tokens although they are not.
    """
    if record.slices is None:
        return
    name, layers = type(model).__name__, _layers(model)
    if layers & SPARSE:
        raise ValueError(
            f"the batch says by slices what its tokens see, and sparse attention (DSAttention) of {name} is causal "
            "whatever they say; leave attention_slices, prefix_lengths and image_token_id out."
        )
    reason = _order_of_rows(model.config, layers) if record.places is not None else ""
    if reason:
        raise ValueError(
            f"{ROTARY} of the batch say that its rows are not a sequence in order, such as a tree of shared prefixes, "
            f"and in {name} {reason}, or pack sequences without common prefixes (cu_seqlens)."
        )


def _order_of_rows(config: Any, layers: set[str]) -> str:
    """What assumes that neighbouring rows are neighbouring tokens, and a way out; "" if nothing does."""
    if getattr(config, "window_size", None) is not None:
        return "window_size counts rows; use full attention"
    if getattr(config, "mtp_num_layers", None):
        return "multi-token prediction takes the next row for the next token; leave out --mtp-num-layers"
    if layers & WITH_STATES:
        return "layers with a state go from row to row; pass the sequences one by one"
    return ""


def _layers(model: Any) -> set[str]:
    """Class names of a model and its modules, and the attention variant in its configuration."""
    variant = getattr(model.config, "experimental_attention_variant", None)
    return {type(module).__name__ for module in model.modules()} | ({variant} if variant else set())
