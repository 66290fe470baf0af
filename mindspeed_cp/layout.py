"""Which tokens of the sequence a rank holds: the only definition of it.

Batches, labels, position ids, RoPE, packed documents and masks are all sliced through ``SequenceLayout``.

The picture, two ranks and eight tokens (uneven lengths give the extra tokens to the first pieces)::

    token        0 1 2 3 4 5 6 7
    contiguous   0 0 0 0 1 1 1 1      Ulysses; ring with a full mask
    zigzag       0 0 1 1 1 1 0 0      causal ring: chunks r and 2n-1-r of 2n, so that every rank has equal work

Hybrid is zigzag over the ring ranks, and each ring rank's tokens contiguous over its Ulysses ranks.
Runs are half-open intervals (start, stop) of global positions, ascending and disjoint.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


def split_sizes(length, parts):
    """Cut ``length`` into ``parts`` whole sizes that differ by at most one; the first parts get the remainder."""
    base, extra = divmod(length, parts)
    return [base + (part < extra) for part in range(parts)]


def _offsets(sizes):
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


def _take(runs, start, stop):
    """The part of ``runs`` that holds their tokens number start to stop, counted along the runs."""
    taken, seen = [], 0
    for low, high in runs:
        first, last = max(start - seen, 0), min(stop - seen, high - low)
        if first < last:
            taken.append((low + first, low + last))
        seen += high - low
    return tuple(taken)


def join_runs(runs):
    """Merge runs that touch, drop empty ones; ``runs`` ascend."""
    joined = []
    for low, high in runs:
        if low == high:
            continue
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def run_positions(runs, device=None):
    """LongTensor of the positions in ``runs``, in their order."""
    pieces = [torch.arange(start, stop, device=device) for start, stop in runs]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long, device=device)


@lru_cache(maxsize=256)
def _ring_runs(ring_size, zigzag, seq_len):
    """Per ring rank, the runs of global positions that it and its Ulysses partners hold together."""
    if not zigzag:
        offsets = _offsets(split_sizes(seq_len, ring_size))
        return tuple(join_runs([(offsets[r], offsets[r + 1])]) for r in range(ring_size))
    offsets = _offsets(split_sizes(seq_len, 2 * ring_size))
    pair = lambda r: [(offsets[c], offsets[c + 1]) for c in (r, 2 * ring_size - 1 - r)]  # noqa: E731
    return tuple(join_runs(pair(r)) for r in range(ring_size))


@dataclass(frozen=True)
class SequenceLayout:
    """The tokens of every context-parallel rank for one sequence length; build it with ``SequenceLayout.build``."""

    seq_len: int
    ulysses_degree: int
    ring_size: int
    zigzag: bool

    @classmethod
    def build(cls, config, seq_len):
        """The layout of ``config`` for a sequence of ``seq_len`` tokens, any length of at least 1."""
        if not isinstance(seq_len, int) or seq_len < 1:
            raise ValueError(f"sequence length {seq_len} must be a whole number of at least 1; pass the global length.")
        return cls(seq_len, config.hierarchy[0], config.ring_size, config.zigzag)

    @property
    def cp_size(self):
        return self.ulysses_degree * self.ring_size

    @cached_property
    def _runs(self):
        runs = []
        for ring_rank in range(self.ring_size):
            offsets = _offsets(self.ulysses_lengths(ring_rank))
            shared = self.ring_runs(ring_rank)
            runs += [_take(shared, offsets[u], offsets[u + 1]) for u in range(self.ulysses_degree)]
        return tuple(runs)

    def ring_runs(self, ring_rank):
        """Runs of global positions that the Ulysses group of ``ring_rank`` holds together, ascending."""
        return _ring_runs(self.ring_size, self.zigzag, self.seq_len)[ring_rank]

    def ring_length(self, ring_rank):
        return sum(stop - start for start, stop in self.ring_runs(ring_rank))

    def ulysses_lengths(self, ring_rank):
        """How many tokens each Ulysses rank of ``ring_rank`` holds."""
        return split_sizes(self.ring_length(ring_rank), self.ulysses_degree)

    def runs(self, cp_rank):
        """Runs of global positions that ``cp_rank`` holds, ascending."""
        if not 0 <= cp_rank < self.cp_size:
            raise ValueError(
                f"cp_rank {cp_rank} must lie in 0 to {self.cp_size - 1} (context parallel size {self.cp_size})."
            )
        return self._runs[cp_rank]

    def length(self, cp_rank):
        """How many tokens ``cp_rank`` holds; 0 is possible when the sequence is shorter than the group."""
        return sum(stop - start for start, stop in self.runs(cp_rank))

    def positions(self, cp_rank):
        """LongTensor of the global positions that ``cp_rank`` holds, ascending."""
        return run_positions(self.runs(cp_rank))

    def shard(self, tensor, cp_rank, dim=0):
        """The part of ``tensor``, whose ``dim`` is the whole sequence, that ``cp_rank`` holds; a view when it is one
        run.
        """
        if tensor.size(dim) != self.seq_len:
            raise ValueError(
                f"dimension {dim} of the tensor has {tensor.size(dim)} entries, the layout {self.seq_len} tokens; "
                "pass the unsharded tensor, or build the layout for its length."
            )
        pieces = [tensor.narrow(dim, start, stop - start) for start, stop in self.runs(cp_rank)]
        if not pieces:
            return tensor.narrow(dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def unshard(self, shards, dim=0):
        """Put the shards of all ranks, in rank order, back into one tensor in sequence order."""
        if len(shards) != self.cp_size:
            raise ValueError(f"unshard takes the shards of all {self.cp_size} ranks in rank order, got {len(shards)}.")
        pieces = []
        for cp_rank, shard in enumerate(shards):
            sizes = [stop - start for start, stop in self.runs(cp_rank)]
            if shard.size(dim) != sum(sizes):
                raise ValueError(
                    f"shard {cp_rank} has {shard.size(dim)} tokens on dimension {dim}, the layout gives it "
                    f"{sum(sizes)}; pass the shards in rank order."
                )
            starts = [start for start, _ in self.runs(cp_rank)]
            pieces += zip(starts, shard.split(sizes, dim=dim) if sizes else ())
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])], dim=dim)
