"""Classify a difference by a common factor, by which rows are wrong, and by which rank holds them.

rows    (rows, features) of a whole output in sequence order; see comparing.Rows
"""

from dataclasses import dataclass

import torch

from mindspeed_cp.prove.comparing import Comparison, Difference, Rows

CLOSE = 1e-3  # largest relative residual after a common factor is divided out
MOST = 4096  # up to this many rows, each wrong row is searched among all rows
FEW = 0.4  # wrong rows at an edge may be at most this fraction of a piece


@dataclass(frozen=True)
class Signature:
    """A kind of fault: its name, what was observed, and where to look first."""

    kind: str
    seen: str
    look: str


def of(difference: Difference, comparison: Comparison) -> Signature | None:
    """The signature of a difference in an output or a gradient; None if it is of no known kind."""
    limits, cp = comparison.limits.largest, comparison.cp
    if difference.rows is not None:
        return of_rows(difference.rows, limits["output"], cp)
    if difference.tensors is not None:
        return of_gradient(*difference.tensors, limits["gradient"], cp)
    return None


def of_rows(rows: Rows, limit: float, cp: int) -> Signature | None:
    errors = rows.errors()
    off = errors > limit
    factor = common_factor(rows.expected, rows.found)
    if factor is not None:
        return _scaled(factor, cp, "the output")
    if not torch.isfinite(rows.found).all():
        return Signature("not a number", f"{int((~torch.isfinite(rows.found)).any(1).sum())} rows hold inf or NaN", "")
    found = _behind_documents(rows, off) or _at_edges(rows, off) or _permuted(rows, off, limit)
    return _of_one_rank(rows, off, cp, found) or found or _anywhere(rows, off)


def common_factor(expected: torch.Tensor, found: torch.Tensor) -> float | None:
    """k if ``found`` is k times ``expected`` and k is not 1, else None."""
    length = float(expected.double().square().sum())
    if not length:
        return None
    factor = float((expected.double() * found.double()).sum()) / length
    left = float((found.double() - factor * expected.double()).norm()) / length**0.5
    return factor if left < CLOSE * max(abs(factor), 1e-6) and abs(factor - 1) > CLOSE else None


def _scaled(factor: float, cp: int, what: str) -> Signature:
    for known, text in ((cp, f"{cp} = cp"), (1 / cp, f"1/{cp} = 1/cp")):
        if abs(factor / known - 1) < CLOSE:
            look = "the scale of the loss, and whether gradients are averaged or summed over the ranks"
            return Signature("factor cp" if known == cp else "factor 1/cp", f"{what} is {text} times what it was", look)
    return Signature("factor", f"{what} is {factor:.4g} times what it was", "a scale or a count")


def _permuted(rows: Rows, off: torch.Tensor, limit: float) -> Signature | None:
    """A signature if every wrong row equals another row of the expected output."""
    places = off.nonzero().flatten()[:MOST]
    if len(places) < 2 or len(rows.expected) > MOST:
        return None
    scale = rows.expected.norm(dim=1).square().mean().sqrt().clamp(min=1e-30)
    near = torch.cdist(rows.found[places].double(), rows.expected.double()) / scale.double()
    nearest = near.min(dim=1)
    if not (nearest.values <= limit).all() or len(set(nearest.indices.tolist())) < max(2, len(places) // 2):
        return None
    seen = f"{int(off.sum())} of {len(off)} rows are other rows of the sequence: row {int(places[0])} is row "
    return Signature(
        "permuted rows", f"{seen}{int(nearest.indices[0])}", "the layout, who split the batch and how, and positions"
    )


def _behind_documents(rows: Rows, off: torch.Tensor) -> Signature | None:
    """A signature if rows are wrong only after the first document."""
    starts = [start for start in rows.documents if 0 < start < len(off)]
    if not starts or off[: starts[0]].any():
        return None
    share = float(off[starts[0] :].float().mean())
    if share < 0.3:
        return None
    seen = f"the first document ({starts[0]} rows) is right, and {share:.0%} of the rows behind it are off"
    return Signature("across documents", seen, "whether attention and positions know where documents end")


def _of_one_rank(rows: Rows, off: torch.Tensor, cp: int, found: Signature | None) -> Signature | None:
    """A signature if only a single rank's rows are wrong; ``found``: what else is known about them."""
    owners = rows.owner[off].unique().tolist()
    if len(owners) != 1 or cp < 2 or (found is not None and found.kind == "across documents"):
        return None
    held = rows.owner == owners[0]
    part = "the whole part" if off[held].all() else f"{int(off.sum())} of {int(held.sum())} rows of the part"
    seen = f"{part} of context-parallel rank {owners[0]} is off, and that of no other rank"
    if found is not None:
        return Signature("one rank's part", f"{seen}; {found.kind}: {found.seen}", found.look)
    return Signature("one rank's part", seen, "what this rank does differently: positions, neighbours, uneven lengths")


def _from_begin(owner: torch.Tensor) -> torch.Tensor:
    """(rows,) distance of each row from the first one that its rank holds in one piece with it."""
    places = torch.arange(len(owner))
    begins = torch.cat([torch.tensor([True]), owner[1:] != owner[:-1]])
    return places - (places * begins).cummax(0).values


def _at_edges(rows: Rows, off: torch.Tensor) -> Signature | None:
    """A signature if only the first or only the last rows of the ranks' contiguous pieces are wrong."""
    begins, ends = _from_begin(rows.owner), _from_begin(rows.owner.flip(0)).flip(0)
    of_begins = "positions, and what a token sees of the rank before: windows, convolutions"
    of_ends = "what is shifted by a token: labels, and the tokens of multi-token prediction"
    for distance, kind, side, look in ((begins, "beginnings", "first", of_begins), (ends, "ends", "last", of_ends)):
        reach, longest = int(distance[off].max()) + 1, int(distance.max()) + 1
        if reach <= FEW * longest and longest > 1:
            seen = f"only the {side} {reach} rows of what a rank holds in one piece are off ({int(off.sum())} rows)"
            return Signature(kind, seen, look)
    return None


def _anywhere(rows: Rows, off: torch.Tensor) -> Signature | None:
    first = int(off.nonzero()[0])
    right = sorted(set(rows.owner.tolist()) - set(rows.owner[off].tolist()))
    owners = f"; the parts of ranks {', '.join(map(str, right))} are right" if right else ""
    if first == 0 and bool(off.all()):
        return Signature("every row", "every row is off", "what all rows share: scale, mask, heads, weights")
    begin = int((rows.owner != rows.owner[0]).nonzero()[0]) if (rows.owner != rows.owner[0]).any() else len(off)
    if first >= begin:
        seen = f"the first {begin} rows are right, and {int(off.sum())} rows behind them are off{owners}"
        look = "positions that count from a rank's own first token, keys and values of other ranks, what is merged"
        return Signature("behind the first piece", seen, look)
    return Signature("some rows", f"{int(off.sum())} of {len(off)} rows are off, the first is row {first}{owners}", "")


def of_gradient(expected: torch.Tensor, found: list[torch.Tensor], limit: float, cp: int) -> Signature | None:
    scale = expected.abs().max().clamp(min=1e-30)
    off = [bool((value - expected).abs().max() / scale > limit) for value in found]
    if any(off) and not all(off):
        wrong = ", ".join(str(rank) for rank, is_off in enumerate(off) if is_off)
        seen = f"context-parallel rank {wrong} holds another gradient than the others"
        return Signature("ranks disagree", seen, "whether gradients are reduced over the context-parallel ranks")
    factors = [common_factor(expected, value) for value in found]
    if factors[0] is not None and None not in factors:
        return _scaled(factors[0], cp, "the gradient")
    if any(not torch.equal(value, found[0]) for value in found[1:]):
        mean = torch.stack(found).mean(0)
        for total, text in ((mean, "mean"), (mean * len(found), "sum")):
            if float((total - expected).abs().max() / scale) <= limit:
                seen = f"every rank holds a gradient of its own, whose {text} is right"
                return Signature("not reduced", seen, "the reduction of gradients over the context-parallel ranks")
        return Signature("not reduced", "every rank holds a gradient of its own", "their reduction over the ranks")
    return None
