"""What the tokens of a batch see where that is neither causal nor a document: slices that come with the batch.

A batch says it in one of three ways: with ``attention_slices``, with ``prefix_lengths``, or with tokens that stand for
parts of an image (``image_token_id``), which see each other inside causal text. ``rotary_position_ids`` (rows, seq)
beside slices say by which positions rotary embeddings turn, where a token's place in the row is not its place in its
sequence; ``PackedTree.batch`` brings both.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mindspeed_cp.megatron.records import Documents, MicroBatch, Places, Slices
from mindspeed_cp.sequence.masks import rows_of_slices
from mindspeed_cp.sequence.runs import Runs, join
from mindspeed_cp.sequence.slice_kinds import prefix_slices, span_slices
from mindspeed_cp.sequence.slice_mask import slices_mask

KEYS = ("attention_slices", "prefix_lengths")
ROTARY = "rotary_position_ids"
STATE_SPACE_MODELS = ("MambaModel", "HybridModel")


def brings_slices(batch: Mapping[str, Any], image_token_id: int | None) -> bool:
    """Whether a batch says what its tokens see by slices."""
    return image_token_id is not None or any(batch.get(key) is not None for key in KEYS)


def slices_of_batch(
    batch: Mapping[str, Any], documents: Documents | None, rows: int, seq_len: int, image_token_id: int | None
) -> tuple[Slices | None, Places | None]:
    """(slices, places) of a batch's record, None where it has none.

    Args:
        rows, seq_len: of the whole batch.
        image_token_id: as ``configure`` was told.

    Raises:
        ValueError: the batch says it in several ways, beside a mask, or in a way that does not fit it.
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
        return _one_if_shared(given), _places(batch.get(ROTARY), rows, seq_len)
    shared: Documents = ((0, seq_len),) if documents is None else documents
    of_rows = shared * (rows // len(shared))
    if named[0] == "prefix_lengths":
        return _one_if_shared(_prefixes(of_rows, batch["prefix_lengths"])), None
    tokens = batch.get("tokens", batch.get("input_ids"))
    if tokens is None:
        return None, None  # a later pipeline stage, to which the first one hands its record
    spans = map(_spans, (tokens == image_token_id).cpu())
    return _one_if_shared(tuple(map(span_slices, of_rows, spans))), None


def _one_if_shared(rows: Slices) -> Slices:
    return rows[:1] if len(set(rows)) == 1 else rows


def _prefixes(of_rows: Documents, lengths: Any) -> Slices:
    given = lengths.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
    if len(given) != len(of_rows):
        raise ValueError(
            f"prefix_lengths of the batch are those of {len(given)} rows, and the batch has {len(of_rows)}; give each "
            "row a number, or one for each of its documents."
        )
    each = [[number] if isinstance(number, int) else list(number) for number in given]
    return tuple(map(prefix_slices, of_rows, each))


def _spans(chosen: torch.Tensor) -> Runs:
    """The runs of True in bool (seq,)."""
    return join((place, place + 1) for place in chosen.nonzero()[:, 0].tolist())


def _places(position_ids: torch.Tensor | None, rows: int, seq_len: int) -> Places | None:
    """Where position ids (rows, seq) place the tokens, as runs; None where they count from 0 to the end.

    Raises:
        ValueError: they are not those of the rows, or beyond the length, to which rotary embeddings are made.
    """
    if position_ids is None:
        return None
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


def check_positions(model: Any, record: MicroBatch) -> None:
    """Raise ValueError where parts of ``model`` take neighbouring rows for neighbouring tokens, and they are not."""
    if record.places is None:
        return
    config, reason = model.config, ""
    if getattr(config, "window_size", None) is not None:
        reason = "window_size counts rows; use full attention"
    elif getattr(config, "mtp_num_layers", None):
        reason = "multi-token prediction takes the next row for the next token; leave out --mtp-num-layers"
    elif type(model).__name__ in STATE_SPACE_MODELS:
        reason = "state-space layers go from row to row; pass the sequences one by one"
    if reason:
        raise ValueError(
            f"{ROTARY} of the batch say that its rows are no sequence in order, such as a tree of shared prefixes, and "
            f"in {type(model).__name__} {reason}, or pack sequences without common prefixes (cu_seqlens)."
        )
