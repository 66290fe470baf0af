"""One rank's record of a run: at the first step the output of every module and the gradient of every parameter; at
each step loss, gradient norm and tokens. A record is plain data, made without communication.

    outputs    in the order in which modules finish; only of the first micro-batch of the first step
    gradients  as the optimizer receives them
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch

WIDEST = 1024  # recorded entries of the last dimension; of wider ones (logits), every n-th is recorded
PER_MODULE = 4  # recorded tensors of one output


@dataclass
class Output:
    """What a module returned: float tensors on the CPU, with at most WIDEST entries on the last dimension.

    Args:
        name: full name of the module, with layers counted over all stages; "#2" marks the second call.
        kind: class of the module.
        caller: the module that called it, if that is not a parent module.
    """

    name: str
    kind: str
    tensors: list[torch.Tensor]
    caller: str = ""


@dataclass
class Chunk:
    """A rank's record of one model chunk.

    Args:
        positions: positions of the tokens that this rank holds, in its order; None before the first module has run.
        seq_len: length of the whole sequence.
        rows: sequences in the micro-batch, 0 if no tensor of the batch tells.
        documents: first positions of the documents in the first row, if the batch contains them.
        gradients, weights: name of a parameter -> gradient, fingerprint at the start.
    """

    positions: torch.Tensor | None = None
    seq_len: int = 0
    rows: int = 0
    documents: tuple[int, ...] = ()
    outputs: list[Output] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


@dataclass
class Step:
    """One training step: (loss, tokens) of every micro-batch by the loss's name, and the gradient norm.

    Tokens are None if the loss function returns no count; the sum over the context-parallel ranks is then the loss.
    """

    losses: list[dict[str, tuple[float, float | None]]] = field(default_factory=list)
    grad_norm: float | None = None


@dataclass
class Record:
    """One rank's record of one run; ``place`` holds its coordinates: tp, pp, cp and their sizes."""

    place: dict[str, int] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class Recorder:
    """Fills a Record during a run.

    Args:
        positions: (length of this rank's part, tensors of the batch) -> (positions of its tokens, whole length); called
            inside the forward pass, on every rank of a context-parallel group at the same module.
        in_place: output of a module -> the same with rows in the order of this rank's tokens; called like
            ``positions``.
        tell: called with the number of completed steps.
    """

    def __init__(
        self,
        positions: Callable[[int, list[Any]], tuple[torch.Tensor, int]],
        in_place: Callable[[torch.Tensor], torch.Tensor],
        tell: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.record = Record()
        self._positions, self._in_place, self._tell = positions, in_place, tell
        self._running: Chunk | None = None

    @contextmanager
    def step(self, chunks: Sequence[torch.nn.Module], place: Mapping[str, int]) -> Iterator[None]:
        """Context manager around forward and backward of a step; at the first step it records outputs and gradients."""
        first = not self.record.steps
        self.record.steps.append(Step())
        if not first:
            yield
            return
        self.record.place = dict(place)
        handles = [handle for chunk in chunks for handle in self._watch(chunk)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for chunk, kept in zip(chunks, self.record.chunks):
            kept.gradients = {name: _gradient(parameter) for name, parameter in named_parameters(chunk)}

    def losses(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's loss function so that its results are recorded."""

        @wraps(loss_function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = loss_function(*args, **kwargs)
            if self.record.steps and isinstance(result, tuple) and len(result) in (2, 3):
                self.record.steps[-1].losses.append(_losses(result))
            return result

        return call

    def grad_norm(self, value: Any) -> None:
        """Record the gradient norm that the optimizer returned; this ends a step."""
        if self.record.steps:
            self.record.steps[-1].grad_norm = None if value is None else float(value)
            self._tell(len(self.record.steps))

    def _watch(self, chunk: torch.nn.Module) -> Iterator[Any]:
        """Register hooks on every module of a chunk; yields their handles."""
        kept = Chunk(weights={name: _fingerprint(value) for name, value in named_parameters(chunk)})
        self.record.chunks.append(kept)
        batch: list[Any] = []
        under_way: list[str] = []
        calls: dict[str, int] = {}

        def begin(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if not kept.outputs:
                self._running, batch[:] = kept, [*args, *kwargs.values()]

        def end(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._running = None
            batch.clear()

        def keep(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._running is not kept:
                return
            while under_way and under_way.pop() != name:  # modules above it on the stack never returned
                pass
            tensors = list(map(self._in_place, _tensors(output)))
            if kept.positions is None and tensors:
                self._locate(kept, batch, tensors[0], chunk)
            calls[name] = calls.get(name, 0) + 1
            called = name if calls[name] == 1 else f"{name}#{calls[name]}"
            caller = next((other for other in reversed(under_way) if not name.startswith(f"{other}.")), "")
            kept.outputs.append(Output(called, type(module).__name__, [_kept(each) for each in tensors], caller))

        yield chunk.register_forward_pre_hook(begin, with_kwargs=True)
        for name, module in named_modules(chunk):
            yield module.register_forward_pre_hook(partial(_note, under_way, name))
            yield module.register_forward_hook(partial(keep, name))
        yield chunk.register_forward_hook(end)

    def _locate(self, kept: Chunk, batch: list[Any], output: torch.Tensor, chunk: torch.nn.Module) -> None:
        """Find which tokens this rank holds, from the batch's tensors, or else from the first output's length."""
        rows = [value for value in batch if isinstance(value, torch.Tensor) and value.dim() == 2]
        length = rows[0].size(1) if rows else output.size(0) * _parts(chunk, self.record.place)
        kept.positions, kept.seq_len = self._positions(length, batch)
        kept.rows = rows[0].size(0) if rows else 0
        kept.documents = tuple(_documents(batch))


def _note(under_way: list[str], name: str, module: torch.nn.Module, args: Any) -> None:
    under_way.append(name)


def _parts(chunk: torch.nn.Module, place: Mapping[str, int]) -> int:
    """Into how many parts the sequence of a hidden state is split over tensor-parallel ranks."""
    return place["tp_size"] if getattr(getattr(chunk, "config", None), "sequence_parallel", False) else 1


def _losses(result: tuple[Any, ...]) -> dict[str, tuple[float, float | None]]:
    """name -> (loss, tokens), from a loss function's result: (loss, report) or (loss, tokens, report)."""
    found: dict[str, tuple[float, float | None]] = {}
    for name, value in dict(result[-1] or {}).items():
        parts: list[float] = []
        for leaf in _leaves(value):
            if isinstance(leaf, torch.Tensor):
                parts += map(float, leaf.flatten().tolist())
            elif isinstance(leaf, (int, float)):
                parts.append(float(leaf))
        if parts:
            found[str(name)] = (parts[0], parts[1] if len(parts) > 1 else None)
    count = float(result[1]) if len(result) == 3 else None
    found["objective"] = (float(result[0].detach().sum()), count)
    return found


def named_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the user's model, parameter) of all trainable parameters."""
    layers = _layer_numbers(chunk)
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            yield _shown(name, layers), parameter


def named_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of all modules inside the wrappers for data parallelism and half precision."""
    layers = _layer_numbers(chunk)
    for name, module in chunk.named_modules():
        shown = _shown(name, layers)
        if shown and shown != "module":
            yield shown, module
        elif type(module).__name__ not in ("DistributedDataParallel", "Float16Module"):
            yield type(module).__name__, module


def _layer_numbers(chunk: torch.nn.Module) -> dict[str, int]:
    """Name of a layer in its stage -> its index in the whole model."""
    numbers = {}
    for name, module in chunk.named_modules():
        number = getattr(module, "layer_number", None)
        head, _, index = name.rpartition(".")
        if index.isdigit() and head.endswith("layers") and isinstance(number, int):
            numbers[name] = number - 1
    return numbers


def _shown(name: str, layers: Mapping[str, int]) -> str:
    head = next((layer for layer in layers if f"{name}.".startswith(f"{layer}.")), None)
    if head is not None and "mtp" not in head:
        name = f"{head.rpartition('.')[0]}.{layers[head]}{name[len(head) :]}"
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    value = getattr(parameter, "main_grad", None)
    value = parameter.grad if value is None else value
    found = torch.zeros_like(parameter) if value is None else value
    return found.detach().float().cpu().clone()


def _fingerprint(parameter: torch.Tensor) -> str:
    value = parameter.detach().float().cpu().contiguous()
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]


def _tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors in a module's output, at most PER_MODULE."""
    tensors = [value for value in _leaves(output) if isinstance(value, torch.Tensor)]
    return [value for value in tensors if value.is_floating_point() and value.dim()][:PER_MODULE]


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    return [value]


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    every = -(-tensor.size(-1) // WIDEST) if tensor.dim() > 2 else 1
    return tensor.detach()[..., ::every].float().cpu().clone()


def _documents(batch: list[Any]) -> list[int]:
    """First positions of the documents in the first row, by packed parameters, dense mask or position ids; else []."""
    for value in batch:
        ends = getattr(value, "cu_seqlens_q", None)
        if ends is not None:
            return [int(end) for end in ends.flatten().tolist()[:-1]]
    for value in batch:
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() == 4 and value.size(-1) > 1:
            hidden = value[0, 0].diagonal(offset=-1)
            return [0, *((hidden.nonzero().flatten() + 1).tolist())]
    numbers = [value for value in batch if isinstance(value, torch.Tensor) and value.dtype == torch.int64]
    positions = [value[0] for value in numbers if value.dim() == 2 and _counts(value[0])]
    return (positions[0] == 0).nonzero().flatten().tolist() if positions else []


def _counts(row: torch.Tensor) -> bool:
    """Whether a row of integers counts up from 0, restarting at 0 where a document begins."""
    return bool(row[0] == 0) and bool(((row[1:] == row[:-1] + 1) | (row[1:] == 0)).all())
