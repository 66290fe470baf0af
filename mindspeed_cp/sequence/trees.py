"""Sequences with common prefixes, packed as a tree: every shared prefix is stored and computed once.

Rollouts of one prompt, turns of a conversation or candidates of a beam would each compute their prefix again as
separate sequences. The picture: three sequences, and how they are packed, depth first::

    A B C D E            A B C D E F G X Y     tokens
    A B C D F G          0 1 2 3 4 4 5 2 3     position_ids
    A B X Y              A B sees itself and is seen by all, C D by E, F G, nobody else

Each token has the same result as in its own sequence, because it sees exactly the tokens before it there. The label of
a token is the token that follows, and where branches part there are several: D predicts E and F, B predicts C and X.
So labels are a separate list, one entry per (token, next token), with the summed weight of the sequences that share it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.packing import whole
from mindspeed_cp.sequence.runs import join
from mindspeed_cp.sequence.slice_mask import AttentionSlice, AttentionSlices, Integers

Tokens = Sequence[int] | torch.Tensor
Weights = Sequence[float] | torch.Tensor


class HeldLabels(NamedTuple):
    """The labels that a rank's rows predict.

    Args:
        rows: (l,) LongTensor, the row of this rank whose logits predict each label.
        labels: (l,) LongTensor of tokens.
        weights: (l,) weight of each label.
        layout: the layout of the list of labels, for ``gather_sequence(values, groups=groups, layout=...)``.
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
        rows, labels: (m,) LongTensor: the row whose logits predict each label, ascending; and the label, a token.
        weights: (m,) float32 or float64, the sum of each label's weights over its sequences.
        places: for each sequence of n tokens, (n - 1,) LongTensor: the indices of its labels among the m.
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
        """The labels that ``cp_rank``'s tokens predict; the sum of their losses over all ranks is the whole loss.

        Args:
            layout: the layout of the packed tokens, padding at their end included.

        Raises:
            ValueError: the layout has fewer tokens than the tree.
        """
        if layout.seq_len < len(self):
            raise ValueError(
                f"the layout is of {layout.seq_len} tokens, and the tree has {len(self)}; build it for len(tree), and "
                "for the padding after it."
            )
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
        """Split values of the labels, such as log-probabilities, by sequence; differentiable.

        Args:
            values: (m, ...) of all labels; gathered from all ranks if there are several.

        Returns:
            for each sequence of n tokens (n - 1, ...), beginning with the value of its second token.
        """
        return [values[places.to(values.device)] for places in self.places]

    def batch(self, multiple_of: int = 1, padding: int = 0) -> dict[str, Any]:
        """A batch of one row for Megatron: tokens, labels, loss_mask, position_ids (1, s), attention_slices, and
        rotary_position_ids, the positions for rotary embeddings.

        Args:
            multiple_of: pad to a multiple of this length; padding tokens see no key and do not count in the loss.

        Raises:
            ValueError: a row has several labels, or multiple_of is not a whole number of at least 1.
        """
        multiple_of = whole("multiple_of", multiple_of, 1)
        several = self.rows[1:][self.rows[1:] == self.rows[:-1]]
        if len(several):
            raise ValueError(
                f"token {int(several[0])} of the tree is followed by several others, and a batch has one label for "
                "each; pack with pack_tree(..., one_label_per_row=True), which repeats that token in each branch."
            )
        length = -(-len(self) // multiple_of) * multiple_of

        def padded(values: torch.Tensor, rows: torch.Tensor, default: int = 0) -> torch.Tensor:
            return values.new_full((length,), default).index_copy_(0, rows, values)[None]

        everyone = torch.arange(len(self), device=self.tokens.device)
        position_ids = padded(self.position_ids, everyone)
        return {
            "tokens": padded(self.tokens, everyone, padding),
            "labels": padded(self.labels, self.rows, padding),
            "loss_mask": padded(self.weights, self.rows),
            "position_ids": position_ids,
            "attention_slices": self.attention_slices,
            "rotary_position_ids": position_ids,
        }


@dataclass
class _Branch:
    """Consecutive tokens that exactly the same sequences share.

    Args:
        members: indices of the sequences.
        depth, end: positions of the shared tokens, half open.
        first, last: positions that become rows; ``first`` is ``depth`` - 1 if the branch repeats its parent's token.
        parent: index of the parent branch, -1 if there is none.
        row: the branch's first row.
        subtree: last row + 1 of the branch and all its descendants.
        label: index of its first label.
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
    """Find the common prefixes of sequences and pack each once.

    Args:
        sequences: lists or 1-D tensors of one device, each with at least one token; duplicates are allowed.
        weights: weight of each token of each sequence as a label, None for 1 everywhere. The first token is never
            predicted, so its weight is ignored. A shared label gets the sum of its sequences' weights.
        one_label_per_row: each branch repeats the token before it, so that every row has at most one label, as
            ``PackedTree.batch`` requires; this adds one token per branch.

    Returns:
        PackedTree. Loss and gradients from its labels and weights are the sums of those of the sequences. Sliding
        windows and the roll of multi-token prediction count packed rows, not positions of a sequence: train trees
        without either.

    Raises:
        ValueError: there is no sequence, a sequence is empty, or the weights do not match the sequences.
    """
    sequences, weights = list(sequences), None if weights is None else list(weights)
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
    array = _array(sequence)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"sequence {number} of pack_tree has shape {array.shape} and dtype {array.dtype}; pass a list or 1-D "
            "tensor of at least one token, a whole number."
        )
    return array.astype(np.int64)


def _array(values: Any) -> npt.NDArray[Any]:
    """``values`` as an array of their own dtype; an array of dtype object if they are ragged."""
    try:
        return np.asarray(values.numpy(force=True) if isinstance(values, torch.Tensor) else values)
    except ValueError:
        return np.asarray(None)


def _checked_weights(number: int, length: int, weights: Sequence[Weights] | None) -> npt.NDArray[np.float64]:
    if weights is None:
        return np.ones(length)
    own = weights[number]
    if isinstance(own, torch.Tensor) and own.requires_grad:
        raise ValueError(
            f"weights of sequence {number} of pack_tree require a gradient, which they would not get; weigh what "
            "PackedTree.per_sequence returns of the log-probabilities, or pass weights.detach()."
        )
    array = _array(own.double() if isinstance(own, torch.Tensor) else own)
    if array.shape != (length,) or array.dtype.kind not in "biuf":
        raise ValueError(
            f"weights of sequence {number} of pack_tree have shape {array.shape} and dtype {array.dtype}, and it has "
            f"{length} tokens; pass one number for each token of each sequence, 0 for those that are not labels."
        )
    return array.astype(np.float64)


def _dtype_of(weights: Sequence[Weights] | None) -> torch.dtype:
    """At least float32: a sum of ones, one per sequence that shares a label, is exact only up to 256 or 2048 in bf16 or
    fp16.
    """
    first = weights[0] if weights is not None and len(weights) else None
    dtype = torch.get_default_dtype()
    if isinstance(first, torch.Tensor) and first.is_floating_point():
        dtype = first.dtype
    return torch.promote_types(dtype, torch.float32)


def _branches(arrays: list[Integers], repeats: bool) -> list[_Branch]:
    """The branches in the order of their rows, depth first."""
    found: list[_Branch] = []
    row = 0
    waiting = [(members, 0, -1) for members in reversed(_groups(range(len(arrays)), arrays, 0))]
    while waiting:
        members, depth, parent = waiting.pop()
        end = _common(arrays, members, depth)
        following = _groups(members, arrays, end)
        moves = repeats and len(following) > 1  # the last token is repeated in every branch instead
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
    """Group the sequences that are longer than ``depth`` by their token there, in order of appearance."""
    groups: dict[int, list[int]] = {}
    for member in members:
        if len(arrays[member]) > depth:
            groups.setdefault(int(arrays[member][depth]), []).append(member)
    return list(groups.values())


def _common(arrays: list[Integers], members: list[int], depth: int) -> int:
    """The position up to which all of these sequences are equal, searched from ``depth`` on."""
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
        if branch.first == branch.depth > 0:  # its first token follows the last token of its parent
            own[0] = branches[branch.parent].stop - 1
        rows.append(own)
        labels.append(arrays[branch.members[0]][begin : branch.end])
    return np.concatenate(rows), np.concatenate(labels)


def _paths(branches: list[_Branch], count: int) -> list[list[_Branch]]:
    """The branches of every sequence, from its first token on."""
    paths: list[list[_Branch]] = [[] for _ in range(count)]
    for branch in branches:
        for member in branch.members:
            paths[member].append(branch)
    return paths


def _slices(branches: list[_Branch]) -> Iterator[AttentionSlice]:
    """Each branch sees itself causally, and all its descendants see it fully."""
    for branch in branches:
        own = (branch.row, branch.stop)
        if branch.row < branch.stop:
            yield own, own, "causal"
            if branch.stop < branch.subtree:
                yield (branch.stop, branch.subtree), own, "full"
