"""Document boundaries, from what Megatron passes: PackedSeqParams, position ids or a dense mask."""

from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 1024  # of a dense mask, so that examining it takes little memory beside it


@dataclass(frozen=True)
class MaskFacts:
    """What a dense mask is.

    Args:
        documents: per batch row the cu_seqlens with which causal attention within documents is this mask; None when the
            mask is something else. Plain causal is a single document.
    """

    documents: tuple[tuple[int, ...], ...] | None

    @property
    def is_causal(self):
        return self.documents is not None and all(len(row) == 2 for row in self.documents)

    @property
    def shared_documents(self):
        """The boundaries when all batch rows share them, else None."""
        return self.documents[0] if self.documents is not None and len(set(self.documents)) == 1 else None


def examine_mask(mask):
    """Recognise causal attention, within documents or plain, in a dense mask.

    Args:
        mask: bool (batch, 1, seq, seq), True = masked out.
    """
    batch, _, seq, _ = mask.shape
    columns = torch.arange(seq, device=mask.device)
    firsts = []
    for start in range(0, seq, ROWS_AT_ONCE):
        visible = mask[:, 0, start : start + ROWS_AT_ONCE].logical_not()
        rows = columns[start : start + ROWS_AT_ONCE]
        first = visible.to(torch.uint8).argmax(-1)
        expected = (columns >= first.unsqueeze(-1)) & (columns <= rows.unsqueeze(-1))
        if not torch.equal(visible, expected):
            return MaskFacts(None)
        firsts.append(first)
    first = torch.cat(firsts, dim=1)
    starts_here = first == columns
    if not (starts_here[:, 1:] | (first[:, 1:] == first[:, :-1])).all():  # a window, not documents
        return MaskFacts(None)
    return MaskFacts(tuple((*row.nonzero().flatten().tolist(), seq) for row in starts_here))


class MaskCache:
    """Remembers the last masks examined: a model's layers share one mask, and recomputation passes a view of it."""

    def __init__(self, size=4):
        self._size = size
        self._entries = {}  # key -> (mask, facts); the mask is kept so that its memory cannot become another's

    def facts(self, mask):
        version = 0 if mask.is_inference() else mask._version  # inference tensors count no versions
        key = (mask.data_ptr(), tuple(mask.shape), mask.stride(), version)
        if key not in self._entries:
            while len(self._entries) >= self._size:
                self._entries.pop(next(iter(self._entries)))
            self._entries[key] = (mask, examine_mask(mask))
        return self._entries[key][1]

    def clear(self):
        self._entries.clear()


def documents_of_position_ids(position_ids):
    """cu_seqlens of a batch whose position ids begin again at 0 with each document.

    Args:
        position_ids: (batch, seq), the whole sequence.

    Returns:
        tuple with the leading 0 and the total.

    Raises:
        ValueError: the rows do not share their boundaries, so no one tuple describes them.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    if not (starts == starts[:1]).all():
        raise ValueError(
            "--reset-attention-mask without a mask in the batch needs document boundaries shared by all rows of a "
            "micro-batch; use --micro-batch-size 1, or leave out --no-create-attention-mask-in-dataloader."
        )
    return (*starts[0].nonzero().flatten().tolist(), position_ids.size(1))


def documents_of_packed_params(params, seq_len=None):
    """cu_seqlens of Megatron's PackedSeqParams, padding included.

    With padded boundaries the tokens of a document are followed by its padding; the padding becomes a document of its
    own, so that no token sees it. The same holds for tokens after the last document.

    Args:
        params: PackedSeqParams in thd.
        seq_len: tokens in the whole packed sequence, None for the last boundary.
    """
    lengths_from = _to_list(params.cu_seqlens_q)
    padded = _to_list(params.cu_seqlens_q_padded) if params.cu_seqlens_q_padded is not None else lengths_from
    boundaries = [0]
    for index in range(len(lengths_from) - 1):
        end = padded[index] + lengths_from[index + 1] - lengths_from[index]
        boundaries += [end, padded[index + 1]] if end < padded[index + 1] else [end]
    if seq_len is not None and boundaries[-1] < seq_len:
        boundaries.append(seq_len)
    return tuple(boundaries)


def _to_list(cu_seqlens):
    return cu_seqlens.flatten().tolist()
