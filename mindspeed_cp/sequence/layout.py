"""The only definition of which tokens of the sequence a rank holds.

Batches, labels, position ids, RoPE, packed documents and masks are all sliced through ``SequenceLayout``, a value that
says for every rank which runs of global positions it holds, whoever split the sequence. Every algorithm computes every
layout exactly; the kinds differ in balance and in who uses them.

The picture, two ranks and eight tokens (uneven lengths give the extra tokens to the first pieces)::

    token            0 1 2 3 4 5 6 7
    contiguous       0 0 0 0 1 1 1 1      Ulysses; ring with a full mask
    zigzag           0 0 1 1 1 1 0 0      chunks r and 2n-1-r of 2n, so that every rank has equal causal work
    document_zigzag  0 1 1 0|0 1 1 0      every document on its own: packed batches of Megatron, verl, ms-swift
    balanced         1 1 1 1|0 0 0 0      documents stay whole, long ones are cut: equal work, few rows travel

Hybrid's own zigzag is over the ring ranks, and each ring rank's tokens are contiguous over its Ulysses ranks.
Runs are half-open intervals (start, stop) of global positions; rows are indices into what a rank holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from mindspeed_cp.sequence import runs as ranges
from mindspeed_cp.sequence.balance import balanced_by_mask, balanced_rings, imbalance
from mindspeed_cp.sequence.cache import RUN_BYTES, kept_up_to
from mindspeed_cp.sequence.masks import attention_masks
from mindspeed_cp.sequence.runs import Boundaries, Run, Runs, boundaries
from mindspeed_cp.sequence.slice_mask import AttentionSlice, document_mask
from mindspeed_cp.settings.config import ContextParallelConfig

LayoutKind = Literal["contiguous", "zigzag", "document_zigzag", "balanced", "runs"]

DOCUMENT_KINDS: frozenset[LayoutKind] = frozenset({"document_zigzag", "balanced"})  # depend on where documents end
UNEVEN = 1.1  # "auto" gives up the zigzag when the largest area exceeds this multiple of the mean


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The tokens of every context-parallel rank; made by ``build`` or ``from_runs``. Layouts with equal runs are equal.

    Attributes:
        all_runs: per cp_rank, the runs of global positions that it holds, in the order in which it holds them.
        ulysses_degree: how many consecutive ranks exchange heads for sequence; together they are one ring rank.
        kind: how the runs were made, for messages only.
    """

    all_runs: tuple[Runs, ...]
    ulysses_degree: int = 1
    kind: LayoutKind = "runs"

    @classmethod
    def build(
        cls,
        config: ContextParallelConfig,
        seq_len: int,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        attention_slices: Sequence[AttentionSlice] | None = None,
    ) -> "SequenceLayout":
        """The layout of ``config`` (its ``batch_layout``) for a sequence of any length of at least 1.

        Args:
            cu_seqlens: document boundaries with the leading 0 and the total. Kinds that do not depend on documents only
                check them.
            attention_slices: what queries see, for all rows of the batch; "balanced" and "auto" use their areas.

        Raises:
            ValueError: the length is not a whole number of at least 1, or boundaries do not fit the length or the kind.
        """
        if not isinstance(seq_len, int) or seq_len < 1:
            raise ValueError(f"sequence length {seq_len} must be a whole number of at least 1; pass the global length.")
        return cls._built(config, seq_len, cu_seqlens, attention_slices).of_degree(config.hierarchy[0])

    @classmethod
    def _built(
        cls,
        config: ContextParallelConfig,
        seq_len: int,
        cu_seqlens: torch.Tensor | Sequence[int] | None,
        attention_slices: Sequence[AttentionSlice] | None,
    ) -> "SequenceLayout":
        documents = (0, seq_len) if cu_seqlens is None else boundaries(cu_seqlens)
        if documents[-1] != seq_len:
            raise ValueError(
                f"cu_seqlens ends with {documents[-1]} and must end with the sequence length {seq_len}; pass the "
                "cumulative lengths of all documents, padding included."
            )
        kind, degree, ring_size = config.layout_kind, config.batch_degree, config.batch_ring
        auto = config.batch_layout == "auto"
        if kind == "document_zigzag":
            return _document_zigzag(documents, degree, ring_size)
        if attention_slices is not None and (auto or kind == "balanced"):
            (mask,) = attention_masks(config.causal, seq_len, attention_slices=attention_slices)
            usual = _even(kind, degree, ring_size, seq_len, True) if auto else None
            if usual is None or imbalance(usual.rings, mask) > UNEVEN:
                return _split(balanced_by_mask(mask, seq_len, ring_size), degree, "balanced")
            return usual
        if kind == "balanced" or (auto and kind == "zigzag" and cu_seqlens is not None):
            return _balanced(degree, ring_size, documents, config.causal, config.ring_ranks_per_node, auto)
        return _even(kind, degree, ring_size, seq_len, auto)

    @classmethod
    def from_runs(cls, config: ContextParallelConfig, runs: Sequence[Sequence[tuple[int, int]]]) -> "SequenceLayout":
        """A layout from given runs, which may be any partition of the positions.

        Args:
            runs: per cp_rank, (start, stop) of global positions in the order in which the rank holds them. A rank may
                hold nothing.

        Raises:
            ValueError: not one list per rank, or not every position from 0 on exactly once.
        """
        cp_size = config.context_parallel_size
        all_runs = tuple(ranges.join((int(start), int(stop)) for start, stop in mine) for mine in runs)
        if len(all_runs) != cp_size:
            raise ValueError(
                f"runs holds {len(all_runs)} lists and --context-parallel-size is {cp_size}; pass one list of (start, "
                "stop) for each rank, an empty one where it holds nothing."
            )
        expected = 0
        for start, stop in sorted(run for mine in all_runs for run in mine):
            if start != expected or stop < start:
                raise ValueError(
                    f"runs must hold every position exactly once, and after {expected} comes ({start}, {stop}); pass "
                    "half-open intervals (start, stop) that cover 0 to the sequence length without a gap."
                )
            expected = stop
        if expected == 0:
            raise ValueError("runs hold no position at all; a sequence has at least one token.")
        return cls(all_runs, config.hierarchy[0])

    def of_degree(self, ulysses_degree: int) -> "SequenceLayout":
        """The same tokens on the same ranks, for another Ulysses degree."""
        return self if ulysses_degree == self.ulysses_degree else _of_degree(self, ulysses_degree)

    @cached_property
    def seq_len(self) -> int:
        return sum(map(ranges.length, self.all_runs))

    @property
    def cp_size(self) -> int:
        return len(self.all_runs)

    @property
    def ring_size(self) -> int:
        return self.cp_size // self.ulysses_degree

    @cached_property
    def _hash(self) -> int:
        return hash((self.all_runs, self.ulysses_degree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, SequenceLayout) and (self._hash, self.ulysses_degree, self.all_runs) == (
            other._hash,
            other.ulysses_degree,
            other.all_runs,
        )

    @cached_property
    def rings(self) -> tuple[Runs, ...]:
        """Per ring rank, what ``ring_runs`` returns."""
        degree = self.ulysses_degree
        together = (sum(self.all_runs[first : first + degree], ()) for first in range(0, self.cp_size, degree))
        return tuple(ranges.join(sorted(runs)) for runs in together)

    def ring_runs(self, ring_rank: int) -> Runs:
        """Runs of global positions that the Ulysses group of ``ring_rank`` holds together, ascending."""
        return self.rings[ring_rank]

    def ring_length(self, ring_rank: int) -> int:
        return ranges.length(self.rings[ring_rank])

    @cached_property
    def _rows(self) -> tuple[tuple[Runs, ...], ...]:
        return tuple(
            tuple(
                ranges.rows_of(self.all_runs[ring_rank * self.ulysses_degree + rank], self.rings[ring_rank])
                for rank in range(self.ulysses_degree)
            )
            for ring_rank in range(self.ring_size)
        )

    def ulysses_rows(self, ring_rank: int) -> tuple[Runs, ...]:
        """Per Ulysses rank, where its tokens lie in ``ring_runs``: (start, stop) of rows, in the rank's own order."""
        return self._rows[ring_rank]

    def joined(self) -> "SequenceLayout":
        """The layout of one rank that holds the tokens of all ranks, one rank after another."""
        return SequenceLayout((ranges.join(run for runs in self.all_runs for run in runs),))

    def runs(self, cp_rank: int) -> Runs:
        """Runs of global positions that ``cp_rank`` holds, in the order in which it holds them."""
        if not 0 <= cp_rank < self.cp_size:
            raise ValueError(
                f"cp_rank {cp_rank} must lie in 0 to {self.cp_size - 1} (context parallel size {self.cp_size})."
            )
        return self.all_runs[cp_rank]

    def length(self, cp_rank: int) -> int:
        """How many tokens ``cp_rank`` holds; 0 is possible when the sequence is shorter than the group."""
        return ranges.length(self.runs(cp_rank))

    @property
    def is_even(self) -> bool:
        """Whether all ranks hold the same number of tokens."""
        return len(set(map(ranges.length, self.all_runs))) == 1

    def positions(self, cp_rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """LongTensor of the global positions that ``cp_rank`` holds, in the order in which it holds them."""
        return ranges.positions(self.runs(cp_rank), device)

    def shard(self, tensor: torch.Tensor, cp_rank: int, dim: int = 0) -> torch.Tensor:
        """The part of ``tensor`` that ``cp_rank`` holds, a view if it is one run; ``dim`` is the whole sequence."""
        if tensor.size(dim) != self.seq_len:
            raise ValueError(
                f"dimension {dim} of the tensor has {tensor.size(dim)} entries, the layout {self.seq_len} tokens; "
                "pass the unsharded tensor, or build the layout for its length."
            )
        pieces = [tensor.narrow(dim, start, stop - start) for start, stop in self.runs(cp_rank)]
        if not pieces:
            return tensor.narrow(dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """Reassemble the shards of all ranks, given in rank order, into one tensor in sequence order."""
        if len(shards) != self.cp_size:
            raise ValueError(f"unshard takes the shards of all {self.cp_size} ranks in rank order, got {len(shards)}.")
        pieces: list[tuple[int, torch.Tensor]] = []
        for cp_rank, shard in enumerate(shards):
            runs = self.runs(cp_rank)
            if shard.size(dim) != ranges.length(runs):
                raise ValueError(
                    f"shard {cp_rank} has {shard.size(dim)} tokens on dimension {dim}, the layout gives it "
                    f"{ranges.length(runs)}; pass the shards in rank order."
                )
            sizes = [stop - start for start, stop in runs]
            pieces += zip((start for start, _ in runs), shard.split(sizes, dim=dim) if sizes else ())
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])], dim=dim)


def _zigzag(start: int, stop: int, ranks: int) -> list[list[Run]]:
    """Chunks r and 2n-1-r of 2n for each of n ranks; sizes differ by at most one."""
    chunks = ranges.cut(((start, stop),), 2 * ranks)
    return [[*chunks[rank], *chunks[2 * ranks - 1 - rank]] for rank in range(ranks)]


def _num_bytes(layout: SequenceLayout) -> int:
    return 3 * RUN_BYTES * sum(map(len, layout.all_runs))  # its own runs, the ring ranks' runs and the rows


@kept_up_to(8 << 20, _num_bytes)
def _of_degree(layout: SequenceLayout, ulysses_degree: int) -> SequenceLayout:
    return SequenceLayout(layout.all_runs, ulysses_degree, layout.kind)


@kept_up_to(8 << 20, _num_bytes)
def _even(kind: LayoutKind, degree: int, ring_size: int, seq_len: int, nested: bool) -> SequenceLayout:
    """contiguous and zigzag; ``nested`` is Hybrid's zigzag over the ring ranks only, which must be balanced."""
    if kind == "contiguous":
        return _split(ranges.cut(((0, seq_len),), ring_size), degree, kind)
    if nested:
        return _split(list(map(ranges.join, _zigzag(0, seq_len, ring_size))), degree, kind)
    # over all ranks, as Megatron splits
    return SequenceLayout(tuple(map(ranges.join, _zigzag(0, seq_len, degree * ring_size))), degree, kind)


def _split(rings: Sequence[Runs], degree: int, kind: LayoutKind) -> SequenceLayout:
    """Each ring rank's tokens, contiguous over its Ulysses ranks."""
    return SequenceLayout(tuple(piece for runs in rings for piece in ranges.cut(runs, degree)), degree, kind)


@kept_up_to(8 << 20, _num_bytes)
def _balanced(
    degree: int, ring_size: int, documents: Boundaries, causal: bool, ranks_per_node: int | None, auto: bool
) -> SequenceLayout:
    """Equal areas on every ring rank; a single document gives a zigzag. "auto" balances only where the zigzag would
    load its ranks unevenly.
    """
    zigzag = _even("zigzag", degree, ring_size, documents[-1], True)
    if auto and imbalance(zigzag.rings, document_mask(right=0, cu_seqlens=documents)) <= UNEVEN:
        return zigzag
    if len(set(documents)) <= 2:
        return _split(zigzag.rings, degree, "balanced")
    return _split(balanced_rings(documents, ring_size, causal, ranks_per_node), degree, "balanced")


@kept_up_to(8 << 20, _num_bytes)
def _document_zigzag(documents: Boundaries, degree: int, ring_size: int) -> SequenceLayout:
    """Each document separately as a zigzag over all ranks; a rank holds its parts document by document."""
    ranks = degree * ring_size
    held: list[list[Run]] = [[] for _ in range(ranks)]
    for index, (start, stop) in enumerate(zip(documents, documents[1:])):
        if (stop - start) % (2 * ranks):
            raise ValueError(
                f"--cp-batch-layout document_zigzag cuts every document into 2 x --context-parallel-size {ranks} equal "
                f"chunks, and document {index} has {stop - start} tokens; pad each document to a multiple of "
                f"{2 * ranks} (cu_seqlens with the padding), or use --cp-batch-layout zigzag, which takes any lengths."
            )
        for mine, chunks in zip(held, _zigzag(start, stop, ranks)):
            mine += chunks
    return SequenceLayout(tuple(map(ranges.join, held)), degree, "document_zigzag")
