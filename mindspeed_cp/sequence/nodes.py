"""Which rank takes which of the filled shares, so that the parts of one document lie within one node.

All shares have equally many tokens and about equal areas, so that any order of them is as good. What a cut document
sends goes over the links within a node where its shares lie there.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.filling import Part

NEAR = 8  # shares of one document that are compared with each; those far away would not get into one node anyway

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Cut:
    """A document that lies on several shares: its parts, and up to where each share reads it.

    Args:
        owner, start, stop: the share of every part, and its tokens.
        reader, last: the shares, ascending in the tokens that they read, and how many these are.
    """

    owner: Integers
    start: Integers
    stop: Integers
    reader: Integers
    last: Integers

    def rows(self, sent: npt.NDArray[np.bool_]) -> int:
        """Rows that readers get of the parts that ``sent`` (readers, parts) names."""
        read = np.clip(np.minimum(self.stop, self.last[:, None]) - self.start, 0, None)
        return int((read * sent).sum())


def within_nodes(shares: list[list[Part]], ranks_per_node: int, causal: bool) -> list[list[Part]]:
    """The shares in the order of ranks, node by node: as they come, or in groups, whichever sends less between nodes.

    Args:
        ranks_per_node: ranks that share a node; the last node may have fewer.
    """
    if not 1 < ranks_per_node < len(shares):
        return shares
    cuts = _cuts(shares, causal)
    groups = _Groups(len(shares), ranks_per_node)
    for _, one, other in sorted(_exchanges(cuts)):
        groups.join(one, other)
    sizes = [min(ranks_per_node, len(shares) - first) for first in range(0, len(shares), ranks_per_node)]
    grouped = [number for node in _packed(groups.members(), sizes) for number in node]
    order = min(range(len(shares)), grouped, key=lambda order: _rows_between(cuts, order, ranks_per_node))
    return [shares[number] for number in order]


def _cuts(shares: list[list[Part]], causal: bool) -> list[_Cut]:
    parts: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for number, share in enumerate(shares):
        for document, start, stop in share:
            parts[document].append((number, start, stop))
    cuts = []
    for held in parts.values():
        owner, start, stop = np.array(held, dtype=np.int64).T
        reader, place = np.unique(owner, return_inverse=True)
        if len(reader) > 1:
            last = np.zeros(len(reader), dtype=np.int64)
            np.maximum.at(last, place, stop if causal else stop.max())
            order = np.argsort(last, kind="stable")
            cuts.append(_Cut(owner, start, stop, reader[order], last[order]))
    return cuts


def _rows_between(cuts: list[_Cut], order: Sequence[int], ranks_per_node: int) -> int:
    """Rows that ranks get from other nodes."""
    node = np.empty(len(order), dtype=np.int64)
    node[np.array(order)] = np.arange(len(order)) // ranks_per_node
    return sum(cut.rows(node[cut.reader][:, None] != node[cut.owner]) for cut in cuts)


def _exchanges(cuts: list[_Cut]) -> list[tuple[int, int, int]]:
    """(less the rows that the second gets of the first, share, share), of shares that read about equally far."""
    found = []
    for cut in cuts:
        tokens = {int(share): int((cut.stop - cut.start)[cut.owner == share].sum()) for share in cut.reader}
        readers = cut.reader.tolist()
        for place, share in enumerate(readers):
            found += [(-tokens[share], share, later) for later in readers[place + 1 : place + 1 + NEAR]]
    return found


class _Groups:
    """Disjoint groups of at most so many shares."""

    def __init__(self, count: int, most: int) -> None:
        self._of, self._members, self._most = list(range(count)), [[number] for number in range(count)], most

    def join(self, one: int, other: int) -> None:
        """Make one group of the two shares' groups where it does not get too large."""
        kept, gone = sorted((self._of[one], self._of[other]))
        if kept == gone or len(self._members[kept]) + len(self._members[gone]) > self._most:
            return
        for number in self._members[gone]:
            self._of[number] = kept
        self._members[kept] += self._members[gone]
        self._members[gone] = []

    def members(self) -> list[list[int]]:
        return [members for members in self._members if members]


def _packed(groups: list[list[int]], sizes: list[int]) -> list[list[int]]:
    """The groups in nodes of these sizes: large ones first, each where it leaves the least room, and in pieces where
    it fits nowhere.
    """
    nodes: list[list[int]] = [[] for _ in sizes]

    def room(node: int) -> int:
        return sizes[node] - len(nodes[node])

    for group in sorted(groups, key=lambda group: (-len(group), group)):
        rest = group
        while rest:
            fitting = [node for node in range(len(nodes)) if room(node) >= len(rest)]
            node = min(fitting, key=room) if fitting else max(range(len(nodes)), key=room)
            taken, rest = rest[: room(node)], rest[room(node) :]
            nodes[node] += taken
    return nodes
