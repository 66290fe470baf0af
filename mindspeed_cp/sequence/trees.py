"""Sequences with common beginnings, packed as a tree: every shared prefix is one row of tokens, computed once.

Rollouts of one prompt, turns of one conversation, candidates of one beam: as sequences of their own each would compute
the prefix again. The picture, three sequences and what is packed, depth first::

    A B C D E            A B C D E F G X Y     tokens
    A B C D F G          0 1 2 3 4 4 5 2 3     position_ids
    A B X Y              A B sees itself and is seen by all, C D by E, F G, nobody else

A token is computed as in its own sequence, because it sees just the tokens before it there. Whoever follows a token is
its label, and where branches part there are several: D predicts E and F, and B predicts C and X. So labels have a list
of their own, one entry for each token that follows another, with the weight of all the sequences that share it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import join
from mindspeed_cp.sequence.slice_mask import AttentionSlice, AttentionSlices, Integers

Tokens = Sequence[int] | torch.Tensor
Weights = Sequence[float] | torch.Tensor


class HeldLabels(NamedTuple):
    """The labels that a rank's rows predict.

    Args:
        rows: (l,) LongTensor, the row of this rank whose logits predict each.
        labels: (l,) LongTensor of tokens.
        weights: (l,) how much each counts.
        layout: of the list of labels, for ``gather_sequence(values, groups=groups, layout=...)``.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    layout: SequenceLayout


@dataclass(frozen=True, eq=False)
class PackedTree:
    """Sequences packed as a tree; made by ``pack_tree``. s tokens, m labels.

    Attributes:
        tokens, position_ids: (s,) LongTensor; positions count from the beginning of the sequences.
        attention_slices: what each token sees, for ``context_parallel_attention``.
        rows, labels: (m,) LongTensor: the row whose logits predict the label, ascending; and the label, a token.
        weights: (m,) the sum of the weights that the label has in its sequences.
        places: for each sequence, (n - 1,) LongTensor: where its labels are among the m.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    attention_slices: AttentionSlices
    rows: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    places: tuple[torch.Tensor, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def held(self, layout: SequenceLayout, cp_rank: int) -> HeldLabels:
        """The labels that ``cp_rank``'s tokens predict; the sum over ranks of what they lose is the whole loss.

        Args:
            layout: of the packed tokens, padding behind them included.
        """
        ends = self.rows.numpy(force=True)
        places = [
            [(int(np.searchsorted(ends, start)), int(np.searchsorted(ends, stop))) for start, stop in runs]
            for runs in layout.all_runs
        ]
        of_labels = SequenceLayout(tuple(map(join, places)), layout.ulysses_degree)
        rows, labels, weights = (of_labels.shard(part, cp_rank) for part in (self.rows, self.labels, self.weights))
        local = torch.empty(layout.seq_len, dtype=torch.long, device=rows.device)
        held = layout.positions(cp_rank, rows.device)
        local[held] = torch.arange(len(held), device=rows.device)
        return HeldLabels(local[rows], labels, weights, of_labels)

    def per_sequence(self, values: torch.Tensor) -> list[torch.Tensor]:
        """What each sequence has of values of the labels, such as log-probabilities; differentiable.

        Args:
            values: (m, ...) of all labels, from all ranks where there are several.

        Returns:
            for each sequence (n - 1, ...), that of its second token first.
        """
        return [values[places.to(values.device)] for places in self.places]

    def batch(self, multiple_of: int = 1, padding: int = 0) -> dict[str, Any]:
        """A batch of one row for Megatron: tokens, labels, loss_mask, position_ids (1, s), attention_slices, and
        rotary_position_ids, by which rotary embeddings turn.

        Args:
            multiple_of: padding tokens, which see nothing and count nothing, make the length a multiple of it.

        Raises:
            ValueError: a row has several labels.
        """
        several = self.rows[1:][self.rows[1:] == self.rows[:-1]]
        if len(several):
            raise ValueError(
                f"token {int(several[0])} of the tree is followed by several others, and a batch has one label for "
                "each; pack with pack_tree(..., one_label_per_row=True), which repeats that token in each branch."
            )
        length = -(-len(self) // multiple_of) * multiple_of

        def whole(values: torch.Tensor, rows: torch.Tensor, default: int = 0) -> torch.Tensor:
            return values.new_full((length,), default).index_copy_(0, rows, values)[None]

        everyone = torch.arange(len(self), device=self.tokens.device)
        position_ids = whole(self.position_ids, everyone)
        return {
            "tokens": whole(self.tokens, everyone, padding),
            "labels": whole(self.labels, self.rows, padding),
            "loss_mask": whole(self.weights, self.rows),
            "position_ids": position_ids,
            "attention_slices": self.attention_slices,
            "rotary_position_ids": position_ids,
        }


@dataclass
class _Branch:
    """Tokens that some sequences share, and no other has after the same beginning.

    Args:
        members: numbers of the sequences.
        depth, end: the positions of the shared tokens.
        first, last: the positions that become rows; one earlier than ``depth`` where a branch repeats a token.
        parent: number of the branch before it, -1 without.
        row: row of the first.
        subtree: row behind the last one of all that follow.
        label: number of its first label.
    """

    members: list[int]
    depth: int
    end: int
    first: int
    last: int
    parent: int
    row: int
    subtree: int = 0
    label: int = 0

    @property
    def stop(self) -> int:
        return self.row + self.last - self.first

    @property
    def num_labels(self) -> int:
        return self.end - max(self.depth, 1)


def pack_tree(
    sequences: Sequence[Tokens], *, weights: Sequence[Weights] | None = None, one_label_per_row: bool = False
) -> PackedTree:
    """Find the common beginnings of sequences and pack each once.

    Args:
        sequences: of tokens, lists or 1-D tensors of one device, each with at least one; equal ones are allowed.
        weights: how much each token of each sequence counts as a label, as long as the sequences; that of the first
            token, which nobody predicts, is not read. None is 1 everywhere. A label that sequences share counts for
            each.
        one_label_per_row: each branch repeats the token before it, so that every row has one label at most, as
            ``PackedTree.batch`` needs it: one more token for each branch.

    Returns:
        PackedTree. Loss and gradients from its labels and weights are the sum of those of the sequences. A sliding
        window counts packed rows, not positions of a sequence, and so does the roll of multi-token prediction: train
        trees without either.

    Raises:
        ValueError: there is no sequence, one is empty, or weights do not fit.
    """
    arrays = [_checked(number, sequence) for number, sequence in enumerate(sequences)]
    if not arrays:
        raise ValueError("pack_tree got no sequences; pass at least one, a list or 1-D tensor of tokens.")
    if weights is not None and len(weights) != len(arrays):
        raise ValueError(
            f"pack_tree got weights for {len(weights)} sequences, and there are {len(arrays)}; pass one list for each."
        )
    given = [_checked_weights(number, len(array), weights) for number, array in enumerate(arrays)]
    branches = _branches(arrays, one_label_per_row)
    rows, labels = _labels(branches, arrays)
    order = np.argsort(rows, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    places, total = [], np.zeros(len(order))
    for array, path, own in zip(arrays, _paths(branches, len(arrays)), given):
        parts = [np.arange(branch.label, branch.label + branch.num_labels) for branch in path]
        places.append(place[np.concatenate(parts)])
        assert len(places[-1]) == len(array) - 1
        np.add.at(total, places[-1], own[1:])
    device = sequences[0].device if isinstance(sequences[0], torch.Tensor) else torch.device("cpu")
    tokens = np.concatenate([arrays[branch.members[0]][branch.first : branch.last] for branch in branches])
    position_ids = np.concatenate([np.arange(branch.first, branch.last) for branch in branches])
    return PackedTree(
        tokens=torch.from_numpy(tokens).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        attention_slices=tuple(_slices(branches)),
        rows=torch.from_numpy(rows[order]).to(device),
        labels=torch.from_numpy(labels[order]).to(device),
        weights=torch.from_numpy(total).to(device, _dtype_of(weights)),
        places=tuple(map(torch.from_numpy, places)),
    )


def _checked(number: int, sequence: Tokens) -> Integers:
    array = np.asarray(sequence.numpy(force=True) if isinstance(sequence, torch.Tensor) else sequence)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"sequence {number} of pack_tree has shape {array.shape} and dtype {array.dtype}; pass a list or 1-D "
            "tensor of at least one token, a whole number."
        )
    return array.astype(np.int64)


def _checked_weights(number: int, length: int, weights: Sequence[Weights] | None) -> npt.NDArray[np.float64]:
    if weights is None:
        return np.ones(length)
    own = weights[number]
    array = np.asarray(own.double().numpy(force=True) if isinstance(own, torch.Tensor) else own, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(
            f"weights of sequence {number} of pack_tree have shape {array.shape}, and it has {length} tokens; pass one "
            "number for each token of each sequence, 0 for those that are no labels."
        )
    return array


def _dtype_of(weights: Sequence[Weights] | None) -> torch.dtype:
    first = weights[0] if weights is not None and len(weights) else None
    return first.dtype if isinstance(first, torch.Tensor) and first.is_floating_point() else torch.get_default_dtype()


def _branches(arrays: list[Integers], repeats: bool) -> list[_Branch]:
    """The branches in the order of their rows, depth first."""
    found: list[_Branch] = []
    row = 0
    waiting = [(members, 0, -1) for members in reversed(_groups(range(len(arrays)), arrays, 0))]
    while waiting:
        members, depth, parent = waiting.pop()
        end = _common(arrays, members, depth)
        following = _groups(members, arrays, end)
        moves = repeats and len(following) > 1  # the last token goes into every branch
        repeated = parent >= 0 and found[parent].last < depth
        branch = _Branch(members, depth, end, depth - repeated, end - moves, parent, row)
        found.append(branch)
        row = branch.stop
        waiting += [(group, end, len(found) - 1) for group in reversed(following)]
    for branch in reversed(found):
        branch.subtree = max(branch.subtree, branch.stop)
        if branch.parent >= 0:
            found[branch.parent].subtree = max(found[branch.parent].subtree, branch.subtree)
    return found


def _groups(members: Sequence[int] | range, arrays: list[Integers], depth: int) -> list[list[int]]:
    """Those of the sequences that go on at ``depth``, by the token there, in the order of appearance."""
    groups: dict[int, list[int]] = {}
    for member in members:
        if len(arrays[member]) > depth:
            groups.setdefault(int(arrays[member][depth]), []).append(member)
    return list(groups.values())


def _common(arrays: list[Integers], members: list[int], depth: int) -> int:
    """Up to where all of these sequences are equal, from ``depth`` on."""
    first = arrays[members[0]]
    end = len(first)
    for member in members[1:]:
        end = min(end, len(arrays[member]))
        differs = first[depth:end] != arrays[member][depth:end]
        end = depth + int(differs.argmax()) if differs.any() else end
    return end


def _labels(branches: list[_Branch], arrays: list[Integers]) -> tuple[Integers, Integers]:
    """(row, label) of every label, branch by branch."""
    rows, labels, count = [], [], 0
    for branch in branches:
        branch.label = count
        count += branch.num_labels
        begin = max(branch.depth, 1)
        own = branch.row + np.arange(begin, branch.end) - 1 - branch.first
        if branch.first == branch.depth > 0:  # its first token follows the last one of its parent
            own[0] = branches[branch.parent].stop - 1
        rows.append(own)
        labels.append(arrays[branch.members[0]][begin : branch.end])
    return np.concatenate(rows), np.concatenate(labels)


def _paths(branches: list[_Branch], count: int) -> list[list[_Branch]]:
    """The branches of every sequence, from its beginning on."""
    paths: list[list[_Branch]] = [[] for _ in range(count)]
    for branch in branches:
        for member in branch.members:
            paths[member].append(branch)
    return paths


def _slices(branches: list[_Branch]) -> Iterator[AttentionSlice]:
    """Each branch is causal, and whole for all that follow it."""
    for branch in branches:
        own = (branch.row, branch.stop)
        if branch.row < branch.stop:
            yield own, own, "causal"
            if branch.stop < branch.subtree:
                yield (branch.stop, branch.subtree), own, "full"
