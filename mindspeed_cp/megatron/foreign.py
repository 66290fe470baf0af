"""The layout of a batch that somebody else split: from its position ids or a declaration, never guessed.

Each rank's position ids say which tokens it holds. The ranks exchange them once for every new pattern and check that
together they are a partition; for every micro-batch they exchange a fingerprint, which is read from the device once.

r: rows of the batch, s: tokens of this rank, S: tokens of the whole sequence.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.documents import documents_of_position_ids, documents_of_tokens, places_in_documents
from mindspeed_cp.megatron.records import Documents, MicroBatch
from mindspeed_cp.megatron.scopes import Scope, collective_device
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.sharding import gather_sequence
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.fields import BatchLayout

if TYPE_CHECKING:
    from mindspeed_cp.megatron.known import Known as Adaptor

KINDS = ("zigzag", "contiguous")  # how others split whole rows
PACKED_KINDS = ("document_zigzag", "contiguous", "zigzag")
KEPT = 64  # number of cached patterns
WAY_OUT = (
    "split whole batches with Megatron's get_batch_on_this_cp_rank or with megatron_adaptor.state().shard_batch, or "
    "declare how they arrive with --cp-batch-layout zigzag or contiguous (cp_partition_mode in a framework's settings)"
)
Found = tuple[SequenceLayout, Documents | None]
Patterns = OrderedDict[Any, Found]


class Foreign:
    """The layouts of batches that others split; one object per process."""

    def __init__(self) -> None:
        self._patterns: WeakKeyDictionary[Scope, Patterns] = WeakKeyDictionary()  # equal on all ranks of a scope

    def clear(self) -> None:
        self._patterns.clear()

    def record(
        self,
        adaptor: "Adaptor",
        scope: Scope,
        ids: torch.Tensor | None,
        tokens: torch.Tensor | None,
        declared: str,
        length: int | None = None,
    ) -> MicroBatch:
        """The record of whole rows that somebody else split.

        Args:
            ids: (r, s), (s,) or (3, r, s) position ids of this rank, or None.
            tokens: (r, s), or None if the model got none; (r, S) if the model got embeddings of its part beside them.
            declared: the kind that was declared, or "".
            length: s, or None if only tokens and ids tell it.

        Raises:
            ValueError: nothing says which tokens this rank holds, or the ranks' tokens are not a partition.
        """
        # Image tokens of multimodal embeddings, (3, r, s), share positions.
        rows = None if ids is None or ids.dim() == 3 else ids.reshape(-1, ids.size(-1))
        if rows is None:
            told = ids if tokens is None else tokens
            length = told.size(-1) if length is None and told is not None else length
            layout, documents = _declared(scope, declared, length), None
        else:
            layout, documents = self._of_ids(scope, rows, declared)

        def whole(part: torch.Tensor) -> torch.Tensor:
            known = part.size(-1) == layout.seq_len
            return part if known else gather_sequence(part, groups=scope.groups, layout=layout, dim=part.dim() - 1)

        settings = adaptor.settings
        if settings.documents_from_position_ids and ids is not None:
            documents = documents_of_position_ids(whole(ids)) if rows is None else documents
        elif settings.end_of_document is not None and tokens is not None:
            documents = documents_of_tokens(whole(tokens).view(-1, layout.seq_len), settings.end_of_document)
        else:
            documents = None
        return MicroBatch(layout, documents, scope, waits_since=adaptor.handed.times)

    def _of_ids(self, scope: Scope, rows: torch.Tensor, declared: str) -> Found:
        def found(everyone: list[torch.Tensor]) -> Found:
            layout = _layout_of_rows(scope.config, everyone, declared)
            whole = layout.unshard([mine.to(torch.long) for mine in everyone], dim=1)
            return layout, documents_of_position_ids(whole)

        return self._once((scope.config, declared), scope, rows, found)

    def packed(
        self, scope: Scope, ids: torch.Tensor, padded: tuple[int, ...], documents: tuple[int, ...], preferred: str
    ) -> SequenceLayout:
        """The layout of packed documents that somebody else split, by their position ids.

        Args:
            ids: (1, s) or (s,), counted from the start of each document or of the whole sequence.
            padded: boundaries in which each document includes its padding.
            documents: boundaries with padding as separate documents.
            preferred: the kind that is used if several fit.

        Raises:
            ValueError: the ids fit no known way of splitting packed documents.
        """

        def found(everyone: list[torch.Tensor]) -> Found:
            return _layout_of_packed(scope, [mine[0] for mine in everyone], padded, documents, preferred), None

        return self._once((scope.config, padded, documents, preferred), scope, ids.reshape(1, -1), found)[0]

    def _once(self, key: Any, scope: Scope, rows: torch.Tensor, found: Callable[[list[torch.Tensor]], Found]) -> Found:
        """``found`` applied to all ranks' position ids, cached by their pattern."""
        group, device = scope.group, collective_device(scope.group)
        asked = torch.tensor([crc32(repr(key).encode())])  # if ranks ask for different things, none uses the cache
        mine = torch.cat([_fingerprint(rows).to(device), asked.to(device)])
        prints = [torch.empty_like(mine) for _ in range(scope.size)]
        dist.all_gather(prints, mine, group=group)
        pattern = key, tuple(map(tuple, torch.stack(prints).tolist()))
        known = self._patterns.setdefault(scope, OrderedDict())
        if pattern not in known:
            everyone: list[Any] = [None] * scope.size
            dist.all_gather_object(everyone, rows.detach().cpu(), group=group)
            known[pattern] = found(everyone)
            if len(known) > KEPT:
                known.popitem(last=False)
        known.move_to_end(pattern)
        return known[pattern]


def _fingerprint(rows: torch.Tensor) -> torch.Tensor:
    """(4,) integers on the same device: number of rows, number of tokens, and two sums that depend on every entry."""
    flat = rows.flatten().to(torch.long)
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    sums = [(flat * place).sum(), ((flat + 7) * (flat + 3) * (place * place + 5)).sum()]
    sizes = torch.tensor(rows.shape, device=flat.device)
    return torch.cat([sizes, torch.stack(sums)])


def _declared(scope: Scope, kind: str, length: int | None) -> SequenceLayout:
    """The layout of the declared kind for the ranks' total length."""
    if not kind:
        raise ValueError(
            "this batch was not split by mindspeed_cp, it brings no position ids that say which tokens this rank "
            f"holds, and nobody declared it; {WAY_OUT}."
        )
    if length is None:
        raise ValueError(
            "a model was given neither tokens nor position ids, and nothing says how its batch was split; pass "
            "position_ids, or run it inside megatron_adaptor.state().running(record)."
        )
    total = torch.tensor([length], device=collective_device(scope.group))
    dist.all_reduce(total, group=scope.group)
    layout = of_kind(scope.config, kind, int(total))
    if layout.length(scope.rank) != length:
        raise ValueError(
            f"context-parallel rank {scope.rank} holds {length} tokens, and {kind} gives it "
            f"{layout.length(scope.rank)} of {layout.seq_len}; pass position_ids, or {WAY_OUT}."
        )
    return layout


@lru_cache(maxsize=256)
def of_kind(
    config: ContextParallelConfig, kind: str, seq_len: int, documents: tuple[int, ...] | None = None
) -> SequenceLayout:
    """The layout of the given kind for rows of this length, independent of the algorithm."""
    return SequenceLayout.build(replace(config, batch_layout=cast(BatchLayout, kind)), seq_len, documents)


def _layout_of_rows(config: ContextParallelConfig, everyone: list[torch.Tensor], declared: str) -> SequenceLayout:
    """The layout that all ranks' (r, s) position ids describe."""
    if len({len(rows) for rows in everyone}) > 1:
        raise ValueError(
            f"the context-parallel ranks hold batches of {', '.join(str(len(rows)) for rows in everyone)} rows; all of "
            "them hold parts of the same rows."
        )
    by_row = [[rows[index].tolist() for rows in everyone] for index in range(len(everyone[0]))]
    partitions = {runs for parts in by_row if (runs := _partition(parts)) is not None}
    if len(partitions) == 1:
        layout = SequenceLayout.from_runs(config, [list(runs) for runs in next(iter(partitions))])
        if all(_is_plausible(layout, parts) for parts in by_row):
            return layout
    if len(partitions) > 1:
        raise ValueError(
            "the rows of this batch were split over the context-parallel ranks in different ways, as their position "
            f"ids say; split all rows alike: {WAY_OUT}."
        )
    if len(everyone) > 1 and all(torch.equal(rows, everyone[0]) for rows in everyone[1:]):
        raise ValueError(
            f"every context-parallel rank was given the same {everyone[0].size(1)} position ids, from "
            f"{int(everyone[0].min())} to {int(everyone[0].max())}: nobody split this batch; {WAY_OUT}."
        )
    return _of_fitting_kind(config, by_row, declared)


def _of_fitting_kind(config: ContextParallelConfig, by_row: list[list[list[int]]], declared: str) -> SequenceLayout:
    """The only kind of whole rows for which documents or padding explain position ids that restart."""
    seq_len = sum(map(len, by_row[0]))
    lengths = [len(part) for part in by_row[0]]
    layouts = {kind: of_kind(config, kind, seq_len) for kind in KINDS}
    layouts["the layout of the configuration"] = SequenceLayout.build(config, seq_len)
    fitting = {
        kind: layout
        for kind, layout in layouts.items()
        if _lengths(layout) == lengths and all(_is_plausible(layout, parts) for parts in by_row)
    }
    if chosen := _chosen(fitting, declared):
        return chosen
    if fitting:
        raise ValueError(
            f"position ids that start again fit {' and '.join(fitting)} alike, and nobody declared which; {WAY_OUT}."
        )
    raise ValueError(f"{_what_is_wrong(by_row[0])}; {WAY_OUT}.")


def _lengths(layout: SequenceLayout) -> list[int]:
    """How many tokens each rank holds."""
    return [layout.length(rank) for rank in range(layout.cp_size)]


def _chosen(fitting: dict[str, SequenceLayout], preferred: str) -> SequenceLayout | None:
    """The layout of the preferred kind, else the only one; None if none fits, or several do."""
    different = set(fitting.values())
    return fitting.get(preferred) or (different.pop() if len(different) == 1 else None)


def _partition(parts: list[list[int]]) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    """Runs of positions of every rank if together they are 0 to S - 1, each once; else None."""
    flat = [position for part in parts for position in part]
    if sorted(flat) != list(range(len(flat))):
        return None
    return tuple(tuple(_runs(part)) for part in parts)


def _runs(part: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for index in range(1, len(part) + 1):
        if index == len(part) or part[index] != part[index - 1] + 1:
            yield part[start], part[index - 1] + 1
            start = index


def _is_plausible(layout: SequenceLayout, parts: list[list[int]]) -> bool:
    """Whether a whole row, assembled by ``layout``, counts up, except for restarts and padding.

    Padding has the same id (0, 1, -1, or that of the token before it) up to the end of the row or to a restart.
    """
    row = layout.unshard([torch.tensor(part, dtype=torch.long) for part in parts])
    before, here, end = row[:-1], row[1:], torch.tensor([True])
    stays = here == before
    padding = (stays | (here == 1)) & torch.cat([stays[1:] | (here[1:] == 0), end])[: len(here)]
    counts = (here == before + 1) | (here == 0) | padding
    return bool(counts.all()) and int(row[0]) in (-1, 0, 1)


def _what_is_wrong(parts: list[list[int]]) -> str:
    holders: dict[int, int] = {}
    for rank, part in enumerate(parts):
        for position in part:
            if position in holders and holders[position] != rank:
                return (
                    f"position {position} is held by context-parallel ranks {holders[position]} and {rank}, as the "
                    "position ids of this batch say"
                )
            holders[position] = rank
    total = sum(map(len, parts))
    missing = next((position for position in range(total) if position not in holders), None)
    if missing is not None:
        return f"position {missing} of {total} is held by no context-parallel rank, as the position ids say"
    return "the position ids of this batch are not a partition of a sequence"


def _layout_of_packed(
    scope: Scope,
    everyone: list[torch.Tensor],
    padded: tuple[int, ...],
    documents: tuple[int, ...],
    preferred: str,
) -> SequenceLayout:
    fitting: dict[str, SequenceLayout] = {}
    for kind in dict.fromkeys((preferred, *PACKED_KINDS)):
        try:
            layout = of_kind(scope.config, kind, padded[-1], padded)
        except ValueError:
            continue  # this kind cannot split one of the documents
        if _lengths(layout) == [len(ids) for ids in everyone] and all(
            _wrong_place(layout.positions(rank), ids, padded, documents) is None for rank, ids in enumerate(everyone)
        ):
            fitting[kind] = layout
    if chosen := _chosen(fitting, preferred):
        return chosen
    if fitting:
        raise ValueError(
            f"the position ids of these packed documents fit {' and '.join(fitting)} alike, and not {preferred}; "
            "declare which with --cp-batch-layout."
        )
    raise ValueError(_contradiction(scope, everyone, padded, documents, preferred))


def _contradiction(
    scope: Scope, everyone: list[torch.Tensor], padded: tuple[int, ...], documents: tuple[int, ...], preferred: str
) -> str:
    """What is wrong with the position ids of this rank, or else of the first rank with wrong ones."""
    layout = of_kind(scope.config, preferred, padded[-1], padded)
    for rank in (scope.rank, *range(layout.cp_size)):
        positions, given = layout.positions(rank), everyone[rank]
        if len(positions) != len(given):
            return (
                f"context-parallel rank {rank} holds {len(given)} packed tokens, and cu_seqlens that end at "
                f"{padded[-1]} give it {len(positions)} in the layout {preferred}"
            )
        at = _wrong_place(positions, given, padded, documents)
        if at is not None:
            place = int(places_in_documents(positions, padded)[at])
            return (
                f"position id {int(given[at])} of packed token {at} of rank {rank} contradicts the layout {preferred}, "
                f"which has place {place} of a document there"
            )
    return f"the position ids of these packed documents contradict the layout {preferred}"


def _wrong_place(
    positions: torch.Tensor, given: torch.Tensor, padded: tuple[int, ...], documents: tuple[int, ...]
) -> int | None:
    """The first token whose position id is neither its place in its document nor in the whole sequence, or None.

    Padding may have any id. If the boundaries do not distinguish padding from tokens, as with verl and ms-swift,
    padding has the id 0; ids of 0 are therefore ignored.
    """
    places = places_in_documents(positions, padded)
    starts = torch.tensor(sorted(set(padded[:-1])))
    first = torch.searchsorted(starts, positions, right=True) - 1
    ends = torch.tensor(documents)[torch.searchsorted(torch.tensor(documents), starts, right=True)]
    wrong = (given != places) & (given != positions) & (given != 0) & (positions < ends[first])
    return int(wrong.nonzero()[0]) if wrong.any() else None
