"""Compare the ranks' records of two runs, one without context parallelism and one with it.

rows       entries of the sequence axis; a whole tensor is assembled from the ranks' parts by their positions
error      of an output: the largest error of a row, relative to a row's typical size (2-norms);
           of a gradient: the largest error of an entry, relative to the largest entry
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mindspeed_cp.prove.limits import Limits
from mindspeed_cp.prove.recording import Chunk, Output, Record, Step

INFINITE = float("inf")
TINY = 1e-30


@dataclass
class Rows:
    """An output along the whole sequence axis, from both runs.

    Args:
        expected, found: (rows, features) float32, in sequence order.
        owner: context-parallel rank that holds each row.
        documents: first positions of the documents.
    """

    expected: torch.Tensor
    found: torch.Tensor
    owner: torch.Tensor
    documents: tuple[int, ...] = ()

    def errors(self) -> torch.Tensor:
        """(rows,) error of each row."""
        scale = self.expected.norm(dim=1).square().mean().sqrt()
        off = (self.found - self.expected).norm(dim=1)
        return torch.nan_to_num(off / scale.clamp(min=TINY), nan=INFINITE)


@dataclass
class Difference:
    """One quantity that differs between the runs.

    Args:
        what: "output", "gradient", "weight", "loss", "gradient norm", "tokens", "positions".
        name: name of the module or parameter, or the step.
        error: relative error, 1 if it cannot be expressed as a number.
        kind: class of the module.
        rows: for outputs on the sequence axis.
        tensors: (expected, found by each context-parallel rank) for gradients.
        order: sorts differences in the order of computation.
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
    limits: Limits
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
        return next((difference for difference in self.differences if difference.what == what), None)

    def note(self, what: str, error: float, **details: Any) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), error)
        self.counted[what] = self.counted.get(what, 0) + 1
        if not error <= self.limits.largest.get(what, 0.0):
            self.differences.append(Difference(what, error=error, **details))


@dataclass(frozen=True)
class _Part:
    """One chunk of the model on one tensor-parallel rank, in both runs.

    Args:
        groups: the chunk on every tensor-parallel rank: without context parallelism, then of each context-parallel
            rank.
    """

    pp: int
    index: int
    tp: int
    groups: list[list[Chunk]]

    @property
    def expected(self) -> Chunk:
        return self.groups[0][self.tp]

    @property
    def found(self) -> list[Chunk]:
        return [group[self.tp] for group in self.groups[1:]]

    @property
    def positions(self) -> list[torch.Tensor]:
        """Those of each context-parallel rank that has any."""
        return [chunk.positions for chunk in self.found if chunk.positions is not None]


def compare(expected: Sequence[Record], found: Sequence[Record], limits: Limits) -> Comparison:
    """Compare the records of all ranks of two runs.

    Args:
        expected: records of the run without context parallelism.
        found: records of the run with it.
    """
    result = Comparison(found[0].place["cp_size"], limits)
    for part in _parts(expected, found, result.cp):
        _compare_weights(result, part)
        if _is_partition(result, part):
            _compare_outputs(result, part)
            _compare_gradients(result, part)
    _compare_steps(result, expected, found)
    result.differences.sort(key=lambda difference: difference.order)
    return result


def _parts(expected: Sequence[Record], found: Sequence[Record], cp: int) -> Iterator[_Part]:
    own, others = _placed(expected), _placed(found)
    for (pp, tp, _), reference in own.items():
        tps = range(reference.place["tp_size"])
        ranks = [[own[pp, each, 0] for each in tps], *([others[pp, each, rank] for each in tps] for rank in range(cp))]
        for index in range(len(reference.chunks)):
            yield _Part(pp, index, tp, [[record.chunks[index] for record in group] for group in ranks])


def _placed(records: Sequence[Record]) -> dict[tuple[int, int, int], Record]:
    """(pipeline-, tensor-, context-parallel rank) -> record of the first data-parallel rank."""
    places = [(record.place, record) for record in records if not record.place["dp"]]
    return {(place["pp"], place["tp"], place["cp"]): record for place, record in places}


def _compare_weights(result: Comparison, part: _Part) -> None:
    for at, (name, value) in enumerate(part.expected.weights.items()):
        others = {chunk.weights.get(name, "missing") for chunk in part.found}
        order = (0, part.index, part.pp, at, part.tp)
        result.note("weight", float(others != {value}), name=name, order=order)


def _is_partition(result: Comparison, part: _Part) -> bool:
    """Whether the ranks together hold every position of the sequence exactly once."""
    chunk, held = part.expected, part.positions
    if chunk.positions is None:
        return False
    whole = torch.cat(held).sort().values if held else torch.empty(0)
    fine = len(held) == len(part.found) and torch.equal(whole, torch.arange(chunk.seq_len))
    result.documents = max(result.documents, len(chunk.documents))
    name = f"{len(whole)} tokens on {len(part.found)} ranks, and {chunk.seq_len} without context parallelism"
    result.note("positions", float(not fine), name=name, order=(1, part.index, part.pp))
    return fine


def _compare_outputs(result: Comparison, part: _Part) -> None:
    by_name = [[{output.name: output for output in chunk.outputs} for chunk in group] for group in part.groups]
    for at, output in enumerate(part.expected.outputs):
        named = [[chunk.get(output.name) for chunk in group] for group in by_name]
        if _is_of_experts(output.name) or any(
            each is None or len(each.tensors) != len(output.tensors) for group in named for each in group
        ):
            result.apart.append(output.name)  # for example the submodules of a replaced attention
            continue
        details = _named(output) | {"order": (2, part.index, part.pp, at, part.tp)}
        for number in range(len(output.tensors)):
            tensors = [[each.tensors[number] for each in group if each] for group in named]
            own = [group[part.tp] for group in tensors]
            rows = _rows(part, tensors)
            if rows is not None:
                result.note("output", float(rows.errors().max()), **details, rows=rows)
            elif all(each.shape == own[0].shape for each in own[1:]):  # not split, so the same on every rank
                result.note("output", max(_largest(each, own[0]) for each in own[1:]), **details)
            else:
                result.apart.append(output.name)


def _is_of_experts(name: str) -> bool:
    """Whether a module sees tokens in the order of experts; their combined output is compared later."""
    return not {"experts", "local_experts"}.isdisjoint(name.split("."))


def _named(output: Output) -> dict[str, Any]:
    name, _, number = output.name.partition("#")
    words = [f"call {number}"] if number else []
    words += [f"called by {output.caller}"] if output.caller and output.caller != "GPTModel" else []
    return {"name": ", ".join([name, *words]), "kind": output.kind}


def _rows(part: _Part, tensors: Sequence[Sequence[torch.Tensor]]) -> Rows | None:
    """The whole output in both runs, or None if it has no sequence axis.

    Args:
        tensors: those of every tensor-parallel rank, in the order of ``part.groups``.
    """
    axis = _axis(part, [group[part.tp] for group in tensors])
    if axis is None:
        return None
    dim, share, each = axis
    groups = [torch.cat(list(group), dim) if share > 1 else group[part.tp] for group in tensors]
    expected, *found = (_as_rows(tensor, dim, each) for tensor in groups)
    whole, owner = torch.empty_like(expected), torch.empty(part.expected.seq_len, dtype=torch.long)
    for rank, (positions, rows) in enumerate(zip(part.positions, found)):
        whole[positions], owner[positions] = rows, rank
    return Rows(expected, whole, owner, part.expected.documents)


def _axis(part: _Part, tensors: Sequence[torch.Tensor]) -> tuple[int, int, int] | None:
    """(dimension, tensor-parallel ranks that share its rows, entries per row), or None if there is no such axis."""
    expected, *found = tensors
    if any(each.dim() != expected.dim() for each in found):
        return None
    seq_len, lengths = part.expected.seq_len, [len(positions) for positions in part.positions]
    for share in dict.fromkeys((1, len(part.groups[0]))):
        for dim, size in enumerate(expected.shape):
            each = size * share // seq_len
            # The first of two dimensions covers both sequence and batch: (seq x batch, features).
            wanted = part.expected.rows or 1 if expected.dim() == 2 and not dim else 1
            if each != wanted or each * seq_len != size * share:
                continue
            fits = all(tensor.size(dim) * share == each * length for tensor, length in zip(found, lengths))
            if fits and all(_without(tensor.shape, dim) == _without(expected.shape, dim) for tensor in found):
                return dim, share, each
    return None


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for place, size in enumerate(shape) if place != dim]


def _as_rows(tensor: torch.Tensor, dim: int, each: int) -> torch.Tensor:
    """(rows, features)"""
    moved = tensor.movedim(dim, 0)
    return moved.reshape(moved.size(0) // each, -1)


def _largest(found: torch.Tensor, expected: torch.Tensor, floor: float = TINY) -> float:
    """Largest difference relative to the largest entry; infinite if there is a NaN."""
    off = torch.nan_to_num((found - expected).abs(), nan=INFINITE).max()
    return float(off / expected.abs().max().clamp(min=floor))


def _compare_gradients(result: Comparison, part: _Part) -> None:
    gradients = part.expected.gradients
    floor = result.limits.small * max((float(value.abs().max()) for value in gradients.values()), default=0.0)
    places = {output.name: at for at, output in enumerate(part.expected.outputs)}
    for at, (name, expected) in enumerate(gradients.items()):
        found = [chunk.gradients[name] for chunk in part.found]
        error = max(_largest(value, expected, max(floor, TINY)) for value in found)
        order = (4, -part.pp, -part.index, -_place_of(name, places), -at, -part.tp)  # backward
        result.note("gradient", error, name=name, tensors=(expected, found), order=order)


def _place_of(parameter: str, places: Mapping[str, int]) -> int:
    """The place of a parameter's module in the order in which modules finish in the forward pass."""
    module = parameter
    while "." in module:
        module = module.rpartition(".")[0]
        if module in places:
            return places[module]
    return -1


def _compare_steps(result: Comparison, expected: Sequence[Record], found: Sequence[Record]) -> None:
    for step, (one, many) in enumerate(zip(_by_step(expected), _by_step(found))):
        details: dict[str, Any] = {"name": f"step {step + 1}", "order": (3, step)}
        (wanted, wanted_tokens), (loss, tokens) = _loss_of(one), _loss_of(many)
        if any(each.losses for each in one):
            result.losses.append((wanted, loss))
            result.note("loss", _off(loss, wanted), **details)
        if wanted_tokens is not None and tokens is not None:
            # Some loss functions return the token count of the whole sequence, others that of the rank.
            result.note("tokens", float(wanted_tokens not in (tokens, tokens / result.cp)), **details)
        norms = one[0].grad_norm, many[0].grad_norm
        if norms[0] is not None and norms[1] is not None:
            result.grad_norms.append((norms[0], norms[1]))
            result.note("gradient norm", _off(norms[1], norms[0]), **details)


def _by_step(records: Sequence[Record]) -> list[list[Step]]:
    """The steps of the ranks that compute the loss: one per context-parallel rank, on the last pipeline stage."""
    last = [record for (pp, tp, _), record in _placed(records).items() if pp == record.place["pp_size"] - 1 and not tp]
    return [list(steps) for steps in zip(*(record.steps for record in last))]


def _loss_of(steps: Sequence[Step]) -> tuple[float, float | None]:
    """(loss, tokens) of one step over its ranks and micro-batches, of the first reported loss."""
    found = [batch for step in steps for batch in step.losses]
    if not found:
        return float("nan"), None
    name = next(iter(found[0]))
    values, counts = zip(*(batch[name] for batch in found if name in batch))
    of_objective = [batch.get("objective", (0.0, None))[1] for batch in found]
    tokens = None if None in of_objective else sum(filter(None, of_objective))
    if None not in counts:
        return sum(values) / max(sum(counts), TINY), tokens
    if name == "objective":  # the ranks' shares of the mean over all tokens
        return sum(values) * len(steps) / len(found), tokens
    return sum(values) / len(values), tokens


def _off(found: float, expected: float) -> float:
    """Relative error; infinite if one of the two is NaN or infinite."""
    error = abs(found - expected) / max(abs(expected), TINY)
    return error if error == error else INFINITE
