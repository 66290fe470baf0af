"""Assign the filled shares to ranks so that the parts of one document lie within one node.

All shares have the same number of tokens and nearly equal areas, so they may be assigned in any order. If all shares
of a cut document lie within one node, its rows travel over the links within that node only.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mindspeed_cp.sequence.filling import Part

NEAR = 8  # each share is compared with this many others of its document; distant ones would not fit one node anyway

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Cut:
    """A document that is spread over several shares: its parts, and how much of it each share reads.

    Args:
        owner, start, stop: the share that holds each part, and the part's tokens.
        reader, last: the shares in ascending order of how many tokens they read, and these numbers.
    """

    owner: Integers
    start: Integers
    stop: Integers
    reader: Integers
    last: Integers

    def rows(self, sent: npt.NDArray[np.bool_]) -> int:
        """How many rows readers receive from the parts selected by ``sent``, bool (readers, parts)."""
        read = np.clip(np.minimum(self.stop, self.last[:, None]) - self.start, 0, None)
        return int((read * sent).sum())


def within_nodes(shares: list[list[Part]], ranks_per_node: int, causal: bool) -> list[list[Part]]:
    """The shares in rank order, node by node: as given or grouped, whichever sends fewer rows between nodes.

    Args:
        ranks_per_node: ranks per node; the last node may have fewer.
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
    """How many rows ranks receive from other nodes."""
    node = np.empty(len(order), dtype=np.int64)
    node[np.array(order)] = np.arange(len(order)) // ranks_per_node
    return sum(cut.rows(node[cut.reader][:, None] != node[cut.owner]) for cut in cuts)


def _exchanges(cuts: list[_Cut]) -> list[tuple[int, int, int]]:
    """(minus the rows that share b receives from share a, a, b), for shares that read a document about equally far."""
    found = []
    for cut in cuts:
        tokens = {int(share): int((cut.stop - cut.start)[cut.owner == share].sum()) for share in cut.reader}
        readers = cut.reader.tolist()
        for place, share in enumerate(readers):
            found += [(-tokens[share], share, later) for later in readers[place + 1 : place + 1 + NEAR]]
    return found


class _Groups:
    """Disjoint groups of at most ``most`` shares."""

    def __init__(self, count: int, most: int) -> None:
        self._of, self._members, self._most = list(range(count)), [[number] for number in range(count)], most

    def join(self, one: int, other: int) -> None:
        """Merge the groups of the two shares unless the result is too large."""
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
    """Pack the groups into nodes of these sizes, largest first, by best fit; a group that fits nowhere is cut."""
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
