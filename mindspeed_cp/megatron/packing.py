"""Packed rows for a training loop: the documents of each micro batch, and their concatenated tokens.

For torch's DataLoader, and with it for Megatron's ``--dataloader-type external``::

    sampler = PackedSampler(lengths, ranks=cp_size, tokens=8192, rows=num_microbatches)
    loader = DataLoader(documents, batch_sampler=sampler, collate_fn=pack_samples)

A batch is one row, a micro batch of size 1; all ranks of a row read the same row. Megatron is not needed here.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from mindspeed_cp.sequence.packing import Rows, pack_documents, whole

SEQUENCES = ("tokens", "labels", "loss_mask", "position_ids")


class PackedSampler:
    """Yields the documents of each row, row by row, with ``rows`` rows in each step.

    A step takes the next documents in order, as many as its rows can hold, and packs them by length. After the last
    document the order starts again. Every rank computes the same rows without communication.

    Args:
        lengths: tokens of each document of the dataset.
        ranks, tokens: a row holds at most ranks x tokens tokens.
        rows: micro batches per step, of all data-parallel ranks together.
        order: indices of documents in the order in which they are read; by default ascending.
        first_step: number of completed steps, when a run is resumed.
        data_parallel_rank, data_parallel_size: rows are dealt in turn; size 1 if each row is spread over all ranks.

    Raises:
        ValueError: a document is too long for a row, there are too few documents for the rows of a step, the ranks
            would get different numbers of rows, or an argument is out of range.
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
        rows, first_step = whole("rows", rows, 1), whole("first_step", first_step, 0)
        size = whole("data_parallel_size", data_parallel_size, 1)
        if not 0 <= data_parallel_rank < size:
            raise ValueError(
                f"data_parallel_rank {data_parallel_rank} must lie in 0 to {size - 1} (data_parallel_size {size}); "
                "leave both out where one row lies over all ranks."
            )
        places = (
            range(len(lengths))
            if order is None
            else [whole(f"order[{number}]", place, 0) for number, place in enumerate(order)]
        )
        if max(places, default=-1) >= len(lengths):
            raise ValueError(
                f"order names document {max(places)}, and there are {len(lengths)}; pass places from 0 to "
                f"{len(lengths) - 1}."
            )
        self._order = [place for place in places if lengths[place]]
        self._lengths = [int(lengths[place]) for place in self._order]
        pack_documents(self._lengths, ranks, tokens)  # each fits
        if len(self._order) < rows:
            raise ValueError(
                f"{len(self._order)} documents cannot fill the {rows} rows of a step, which have one at least; use "
                f"fewer rows (--global-batch-size {max(len(self._order), 1)}), or more documents."
            )
        if rows % size:
            raise ValueError(
                f"{rows} rows of a step must be divisible by the {size} data-parallel ranks; use "
                f"{-(-rows // size) * size}, or one row over all ranks."
            )
        self._ranks, self._tokens, self._rows, self._first = ranks, tokens, rows, first_step
        self._mine = slice(data_parallel_rank, None, size)

    def __iter__(self) -> Iterator[list[int]]:
        start = step = 0
        while True:
            number, rows = self._step(start)
            if step >= self._first:
                for row in rows[self._mine]:
                    yield [self._order[(start + place) % len(self._order)] for place in row]
            start, step = (start + number) % len(self._order), step + 1

    def _step(self, start: int) -> tuple[int, Rows]:
        """(number of documents from ``start`` on that the step takes, its rows as indices relative to ``start``)."""
        count, room, known = 0, self._rows * self._ranks * self._tokens, len(self._order)
        lengths: list[int] = []
        while (length := self._lengths[(start + count) % known]) <= room:
            lengths.append(length)
            room, count = room - length, count + 1
        rows = pack_documents(lengths, self._ranks, self._tokens)
        while len(rows) > self._rows:  # since not every row can be filled completely
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
    """Split the row with the most documents in two."""
    number = max(range(len(rows)), key=lambda number: len(rows[number]))
    row = rows[number]
    return (*rows[:number], row[: len(row) // 2], row[len(row) // 2 :], *rows[number + 1 :])


def pack_samples(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate documents to one row; a collate_fn for ``DataLoader``.

    Args:
        samples: for each document tokens (length,), and optionally other fields of SEQUENCES.

    Returns:
        tokens and the other fields (1, total), position_ids (if missing, counted from each document's start),
        cu_seqlens int32 (documents + 1,), max_seqlen int32 ().

    Raises:
        ValueError: there is no sample, one has no tokens, a sample's tensors differ in length, or samples have
            different fields.
    """
    names = [name for name in SEQUENCES if any(name in sample for sample in samples)]
    if "tokens" not in names:
        raise ValueError(f"pack_samples got {len(samples)} samples without tokens; pass one or more that hold them.")
    lengths = [sample["tokens"].numel() if "tokens" in sample else 0 for sample in samples]
    for number, (sample, length) in enumerate(zip(samples, lengths)):
        if any(name not in sample or sample[name].shape != (length,) for name in names):
            raise ValueError(
                f"sample {number} must hold {', '.join(names)} of {length} tokens each, as others do; give every "
                "document the same fields, in one dimension."
            )
    row = {name: torch.cat([sample[name] for sample in samples])[None] for name in names}
    if "position_ids" not in row:
        row["position_ids"] = torch.cat([torch.arange(length, device=row["tokens"].device) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return row | {"cu_seqlens": ends.to(torch.int32), "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32)}
