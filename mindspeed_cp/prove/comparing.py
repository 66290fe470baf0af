"""Compare the ranks' records of two runs, one without context parallelism and one with it.

rows       entries of the sequence axis; a whole tensor is assembled from the ranks' parts by their positions
error      of an output: the largest error of a row, relative to a row's typical size (2-norms);
           of a gradient: the largest error of an entry, relative to the largest entry
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mindspeed_cp.prove.limits import Limits
from mindspeed_cp.prove.recording import Chunk, Output, Record
from mindspeed_cp.prove.steps import by_step, loss_of, off

INFINITE = float("inf")


@dataclass
class Rows:
    """An output along the whole sequence axis, from both runs.

    Args:
        expected, found: (rows, features) float32, in sequence order.
        owner: context-parallel rank that holds each row.
        local: index of each row within its rank's part.
        documents: first positions of the documents.
    """

    expected: torch.Tensor
    found: torch.Tensor
    owner: torch.Tensor
    local: torch.Tensor
    documents: tuple[int, ...] = ()

    def errors(self) -> torch.Tensor:
        """(rows,) error of each row."""
        scale = self.expected.norm(dim=1).square().mean().sqrt()
        off = (self.found - self.expected).norm(dim=1)
        return torch.nan_to_num(off / scale.clamp(min=1e-30), nan=INFINITE)


@dataclass
class Difference:
    """One quantity that differs between the runs.

    Args:
        what: "output", "gradient", "weight", "loss", "gradient norm", "tokens", "positions".
        name: name of the module or parameter, or the step.
        error: relative error, 1 if it cannot be expressed as a number.
        rows: for outputs on the sequence axis.
        tensors: (expected, found by each context-parallel rank) for gradients.
    """

    what: str
    name: str
    error: float
    kind: str = ""
    rows: Rows | None = None
    tensors: tuple[torch.Tensor, list[torch.Tensor]] | None = None
    order: tuple[int, ...] = ()


@dataclass
class Comparison:
    """What was compared and what differs, in the order of computation.

    Args:
        worst: "output", "gradient", "loss", "gradient norm" -> largest error found.
        counted: how many modules, parameters and steps were compared.
        apart: modules that were not compared, because their outputs have no common axis in the two runs.
        documents: the largest number of documents in a first batch.
        losses, grad_norms: (without, with context parallelism) of each step.
    """

    cp: int
    differences: list[Difference] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    documents: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    grad_norms: list[tuple[float, float]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences

    def first(self, what: str) -> Difference | None:
        """The first difference of a kind: outputs in the order of forward, gradients in the order of backward."""
        found = [difference for difference in self.differences if difference.what == what]
        return found[0] if found else None

    def note(self, what: str, error: float, limit: float, **details: Any) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), error)
        self.counted[what] = self.counted.get(what, 0) + 1
        if not error <= limit:
            self.differences.append(Difference(what, error=error, **details))


def compare(expected: Sequence[Record], found: Sequence[Record], limits: Limits, cp: int) -> Comparison:
    """Compare the records of all ranks of two runs.

    Args:
        expected: records of the run without context parallelism, one per tensor- and pipeline-parallel rank.
        found: records of the run with it.
    """
    result = Comparison(cp)
    pairs = list(_paired(expected, found))
    for reference, ranks in pairs:
        _compare_chunks(result, reference, ranks, expected, found, limits)
    _compare_steps(result, expected, found, limits)
    rising = [difference for difference in result.differences if difference.what != "gradient"]
    backward = [difference for difference in result.differences if difference.what == "gradient"]
    rising.sort(key=lambda difference: difference.order)
    backward.sort(key=lambda difference: difference.order, reverse=True)
    result.differences = rising + backward
    return result


def _paired(expected: Sequence[Record], found: Sequence[Record]) -> Iterable[tuple[Record, list[Record]]]:
    """(reference, the context-parallel ranks with the same tensor- and pipeline-parallel rank)."""
    for reference in expected:
        if reference.place.get("dp", 0):
            continue
        ranks = [rank for rank in found if _stage(rank) == _stage(reference) and not rank.place["dp"]]
        yield reference, sorted(ranks, key=lambda rank: rank.place["cp"])


def _stage(record: Record) -> tuple[int, int]:
    return record.place["pp"], record.place["tp"]


def _compare_chunks(
    result: Comparison,
    reference: Record,
    ranks: Sequence[Record],
    expected: Sequence[Record],
    found: Sequence[Record],
    limits: Limits,
) -> None:
    pp, tp = _stage(reference)
    for index, chunk in enumerate(reference.chunks):
        parts = [rank.chunks[index] for rank in ranks]
        where = {"index": index, "pp": pp, "tp": tp}
        _compare_weights(result, chunk, parts, where)
        if not _is_partition(result, chunk, parts, where):
            continue
        slices = _Slices(chunk, parts, tp, reference.place["tp_size"])
        siblings = _siblings(expected, index, pp), [_siblings(found, index, pp, cp) for cp in range(len(ranks))]
        _compare_outputs(result, slices, siblings, where, limits)
        _compare_gradients(result, chunk, parts, where, limits)


def _siblings(records: Sequence[Record], index: int, pp: int, cp: int = 0) -> list[Chunk]:
    """The same chunk from all tensor-parallel ranks, in rank order."""
    found = [
        record for record in records if record.place["pp"] == pp and record.place["cp"] == cp and not record.place["dp"]
    ]
    return [record.chunks[index] for record in sorted(found, key=lambda record: record.place["tp"])]


def _compare_weights(result: Comparison, chunk: Chunk, parts: Sequence[Chunk], where: Mapping[str, int]) -> None:
    for at, (name, value) in enumerate(chunk.weights.items()):
        others = {part.weights.get(name, "missing") for part in parts}
        result.note(
            "weight", float(others != {value}), 0.0, name=name, order=(0, where["index"], where["pp"], at, where["tp"])
        )


def _is_partition(result: Comparison, chunk: Chunk, parts: Sequence[Chunk], where: Mapping[str, int]) -> bool:
    """Whether the ranks together hold every position of the sequence exactly once."""
    if chunk.positions is None:
        return False
    held = [part.positions for part in parts if part.positions is not None]
    whole = torch.cat(held).sort().values if held else torch.empty(0)
    fine = len(held) == len(parts) and torch.equal(whole, torch.arange(chunk.seq_len))
    result.documents = max(result.documents, len(chunk.documents))
    name = f"{len(whole)} tokens on {len(parts)} ranks, and {chunk.seq_len} without context parallelism"
    result.note("positions", float(not fine), 0.0, name=name, order=(1, where["index"], where["pp"]))
    return fine


class _Slices:
    """Where the rows of an output are: on which axis, and which rows a rank holds.

    Args:
        chunk: the reference's chunk.
        parts: the context-parallel ranks' chunks.
    """

    def __init__(self, chunk: Chunk, parts: Sequence[Chunk], tp: int, tp_size: int) -> None:
        self.chunk, self.parts, self.tp, self.tp_size = chunk, parts, tp, tp_size
        self.seq_len = chunk.seq_len
        self.positions = [part.positions for part in parts if part.positions is not None]

    def axis(self, expected: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[int, int, int] | None:
        """(dimension, tensor-parallel ranks that share its rows, entries per row), or None if there is no such axis."""
        if any(part.dim() != expected.dim() for part in parts):
            return None
        lengths = [len(positions) for positions in self.positions]
        for share in dict.fromkeys((1, self.tp_size)):
            for dim, size in enumerate(expected.shape):
                each = size * share // self.seq_len
                # The first of two dimensions covers both sequence and batch: (seq x batch, features).
                wanted = self.chunk.rows or 1 if expected.dim() == 2 and not dim else 1
                if each != wanted or each * self.seq_len != size * share:
                    continue
                fits = all(part.size(dim) * share == each * length for part, length in zip(parts, lengths))
                others = all(_without(part.shape, dim) == _without(expected.shape, dim) for part in parts)
                if fits and others:
                    return dim, share, each
        return None


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for place, size in enumerate(shape) if place != dim]


def _compare_outputs(
    result: Comparison,
    slices: _Slices,
    siblings: tuple[list[Chunk], list[list[Chunk]]],
    where: Mapping[str, int],
    limits: Limits,
) -> None:
    """``siblings``: the tensor-parallel ranks of the reference, and those of each context-parallel rank."""
    own, others = siblings
    by_name = [[{output.name: output for output in chunk.outputs} for chunk in chunks] for chunks in (own, *others)]
    for at, output in enumerate(slices.chunk.outputs):
        order = (2, where["index"], where["pp"], at, where["tp"])
        named = [[chunk.get(output.name) for chunk in chunks] for chunks in by_name]
        if _is_of_experts(output.name) or any(
            each is None or len(each.tensors) != len(output.tensors) for group in named for each in group
        ):
            result.apart.append(output.name)  # for example the submodules of a replaced attention
        else:
            for number in range(len(output.tensors)):
                tensors = [[each.tensors[number] for each in group if each] for group in named]
                _compare_output(result, slices, output, tensors, order, limits)


def _is_of_experts(name: str) -> bool:
    """Whether a module sees tokens in the order of experts; their combined output is compared later."""
    return "experts" in name.split(".") or "local_experts" in name.split(".")


def _compare_output(
    result: Comparison,
    slices: _Slices,
    output: Output,
    tensors: Sequence[Sequence[torch.Tensor]],
    order: tuple[int, ...],
    limits: Limits,
) -> None:
    """``tensors``: those of the reference's tensor-parallel ranks, then those of each context-parallel rank."""
    own = [group[slices.tp] for group in tensors]
    found = slices.axis(own[0], own[1:])
    if found is None:
        if all(part.shape == own[0].shape for part in own[1:]):  # not split, so the same on every rank
            error = max(_largest(part, own[0]) for part in own[1:])
            result.note("output", error, limits.output, **_named(output), order=order)
        else:
            result.apart.append(output.name)
        return
    dim, share, each = found
    groups = [torch.cat(list(group), dim) if share > 1 else group[slices.tp] for group in tensors]
    rows = [_as_rows(tensor, dim, each) for tensor in groups]
    whole = torch.empty_like(rows[0])
    owner, local = (torch.empty(slices.seq_len, dtype=torch.long) for _ in range(2))
    for cp, positions in enumerate(slices.positions):
        whole[positions] = rows[1 + cp]
        owner[positions], local[positions] = cp, torch.arange(len(positions))
    compared = Rows(rows[0], whole, owner, local, slices.chunk.documents)
    error = float(compared.errors().max())
    result.note("output", error, limits.output, **_named(output), rows=compared, order=order)


def _named(output: Output) -> dict[str, str]:
    name, _, number = output.name.partition("#")
    words = [f"call {number}"] if number else []
    words += [f"called by {output.caller}"] if output.caller and output.caller != "GPTModel" else []
    return {"name": ", ".join([name, *words]), "kind": output.kind}


def _as_rows(tensor: torch.Tensor, dim: int, each: int) -> torch.Tensor:
    """(rows, features)"""
    moved = tensor.movedim(dim, 0)
    return moved.reshape(moved.size(0) // each, -1)


def _largest(found: torch.Tensor, expected: torch.Tensor, floor: float = 1e-30) -> float:
    """Largest difference relative to the largest entry; infinite if there is a NaN."""
    off = torch.nan_to_num((found - expected).abs(), nan=INFINITE).max()
    return float(off / expected.abs().max().clamp(min=floor))


def _compare_gradients(
    result: Comparison, chunk: Chunk, parts: Sequence[Chunk], where: Mapping[str, int], limits: Limits
) -> None:
    floor = limits.small * max((float(value.abs().max()) for value in chunk.gradients.values()), default=0.0)
    places = {output.name: at for at, output in enumerate(chunk.outputs)}
    for at, (name, expected) in enumerate(chunk.gradients.items()):
        found = [part.gradients[name] for part in parts]
        error = max(_largest(value, expected, max(floor, 1e-30)) for value in found)
        order = (where["pp"], where["index"], _place_of(name, places), at, where["tp"])
        result.note("gradient", error, limits.gradient, name=name, tensors=(expected, found), order=order)


def _place_of(parameter: str, places: Mapping[str, int]) -> int:
    """The place of a parameter's module in the order in which modules finish in the forward pass."""
    module = parameter
    while "." in module:
        module = module.rpartition(".")[0]
        if module in places:
            return places[module]
    return -1


def _compare_steps(result: Comparison, expected: Sequence[Record], found: Sequence[Record], limits: Limits) -> None:
    for step, (one, many) in enumerate(zip(by_step(expected), by_step(found))):
        details = {"name": f"step {step + 1}", "order": (3, step)}
        (wanted, wanted_tokens), (loss, tokens) = loss_of(one), loss_of(many)
        if any(each.losses for each in one):
            result.losses.append((wanted, loss))
            result.note("loss", off(loss, wanted), limits.loss, **details)
        if wanted_tokens is not None and tokens is not None:
            # Some loss functions return the token count of the whole sequence, others that of the rank.
            equal = wanted_tokens in (tokens, tokens / result.cp)
            result.note("tokens", float(not equal), 0.0, **details)
        norms = one[0].grad_norm, many[0].grad_norm
        if norms[0] is not None and norms[1] is not None:
            result.grad_norms.append((norms[0], norms[1]))
            result.note("gradient norm", off(norms[1], norms[0]), limits.grad_norm, **details)
