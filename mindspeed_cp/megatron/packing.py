"""Packed rows for a training loop: which documents make up each micro batch, and their tokens end to end.

For torch's DataLoader, and with it for Megatron's ``--dataloader-type external``::

    sampler = PackedSampler(lengths, ranks=cp_size, tokens=8192, rows=num_microbatches)
    loader = DataLoader(documents, batch_sampler=sampler, collate_fn=pack_samples)

A batch is one row, one micro batch of size 1; all ranks of a row read the same. Nothing here needs Megatron.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from mindspeed_cp.sequence.packing import Rows, pack_documents

SEQUENCES = ("tokens", "labels", "loss_mask", "position_ids")


class PackedSampler:
    """The documents of each row, row after row, ``rows`` of them in each step.

    A step takes the next documents of the order, as many as its rows can hold; within the step they are packed by
    length. The order begins anew after its last document. Every rank walks the same way, and needs nobody to ask.

    Args:
        lengths: tokens of each document of the dataset.
        ranks, tokens: a row holds ranks x tokens tokens at most.
        rows: micro batches of a step, of all data-parallel ranks together.
        order: places of documents, the order in which they are read; by default as they lie.
        first_step: steps that are over, when a run goes on.
        data_parallel_rank, data_parallel_size: rows are dealt out one by one; 1 where one row lies over all ranks.

    Raises:
        ValueError: documents are too long for a row, too few for the rows of a step, or rows are none for some rank.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        ranks: int,
        tokens: int,
        rows: int,
        order: Sequence[int] | None = None,
        first_step: int = 0,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        self._order = [place for place in (range(len(lengths)) if order is None else order) if lengths[place]]
        self._lengths = [int(lengths[place]) for place in self._order]
        pack_documents(self._lengths, ranks, tokens)  # each fits
        if len(self._order) < rows:
            raise ValueError(
                f"{len(self._order)} documents cannot fill the {rows} rows of a step, which have one at least; use "
                f"fewer rows (--global-batch-size {max(len(self._order), 1)}), or more documents."
            )
        if rows % data_parallel_size:
            raise ValueError(
                f"{rows} rows of a step must be divisible by the {data_parallel_size} data-parallel ranks; use "
                f"{-(-rows // data_parallel_size) * data_parallel_size}, or one row over all ranks."
            )
        self._ranks, self._tokens, self._rows, self._first = ranks, tokens, rows, first_step
        self._mine = slice(data_parallel_rank, None, data_parallel_size)

    def __iter__(self) -> Iterator[list[int]]:
        start = step = 0
        while True:
            number, rows = self._step(start)
            if step >= self._first:
                for row in rows[self._mine]:
                    yield [self._order[(start + place) % len(self._order)] for place in row]
            start, step = (start + number) % len(self._order), step + 1

    def _step(self, start: int) -> tuple[int, Rows]:
        """(how many documents from ``start`` on the step takes, its rows: places counted from there)."""
        count, room, known = 0, self._rows * self._ranks * self._tokens, len(self._order)
        lengths: list[int] = []
        while (length := self._lengths[(start + count) % known]) <= room:
            lengths.append(length)
            room, count = room - length, count + 1
        rows = pack_documents(lengths, self._ranks, self._tokens)
        while len(rows) > self._rows:  # not every row can be filled up
            lengths = lengths[: -max(1, len(rows) - self._rows)]
            rows = pack_documents(lengths, self._ranks, self._tokens)
        while len(rows) < self._rows:
            if len(lengths) < self._rows:
                lengths.append(self._lengths[(start + len(lengths)) % known])
                rows = tuple((place,) for place in range(len(lengths)))
            else:
                rows = _one_more(rows)
        return len(lengths), rows


def _one_more(rows: Rows) -> Rows:
    """The row of most documents in two."""
    number = max(range(len(rows)), key=lambda number: len(rows[number]))
    row = rows[number]
    return (*rows[:number], row[: len(row) // 2], row[len(row) // 2 :], *rows[number + 1 :])


def pack_samples(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One row of documents end to end, as ``DataLoader``'s collate_fn.

    Args:
        samples: of each document tokens (length,), and what else is in SEQUENCES.

    Returns:
        tokens and the others (1, total), position_ids that count from each document's start where they had none,
        cu_seqlens int32 (documents + 1,), max_seqlen int32 ().

    Raises:
        ValueError: a sample's tensors differ in length, or samples in what they hold.
    """
    names = [name for name in SEQUENCES if name in samples[0]]
    lengths = [sample["tokens"].numel() for sample in samples]
    for number, (sample, length) in enumerate(zip(samples, lengths)):
        if any(name not in sample or sample[name].shape != (length,) for name in names):
            raise ValueError(
                f"sample {number} must hold {', '.join(names)} of {length} tokens each, as the first one does; give "
                "every document the same fields, in one dimension."
            )
    row = {name: torch.cat([sample[name] for sample in samples])[None] for name in names}
    if "position_ids" not in row:
        row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return row | {"cu_seqlens": ends.to(torch.int32), "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32)}
