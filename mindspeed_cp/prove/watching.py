"""Hooks into Megatron's pipeline schedules, loss functions and optimizers, whatever script calls them."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.prove.recording import Recorder

SCHEDULES = "megatron.core.pipeline_parallel.schedules"
SCHEDULE_NAMES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
)
OPTIMIZERS = "megatron.core.optimizer.optimizer"
OPTIMIZER_NAMES = ("ChainedOptimizer", "FP32Optimizer", "MixedPrecisionOptimizer")
MANY = 1 << 40  # more than the number of tokens on a rank


@contextmanager
def watch(recorder: Recorder) -> Iterator[None]:
    """Context manager in which ``recorder`` records every training step of this process."""
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, build: Callable[..., Any]) -> None:
        original = vars(owner)[name]
        undo.append((owner, name, original))
        setattr(owner, name, build(original, recorder))

    schedules = importlib.import_module(SCHEDULES)
    for name in SCHEDULE_NAMES:
        replace(schedules, name, _schedule)
    optimizers = importlib.import_module(OPTIMIZERS)
    depth: list[Any] = []  # optimizers whose step is running
    for name in OPTIMIZER_NAMES:
        owner = getattr(optimizers, name, None)
        if owner is not None and "step" in vars(owner):
            replace(owner, "step", partial(_optimizer_step, depth))
    try:
        yield
    finally:
        while undo:
            setattr(*undo.pop())


def _schedule(original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    @wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("forward_only") or "model" not in kwargs:
            return original(*args, **kwargs)  # Megatron's schedules take only keyword arguments
        chunks = listed(kwargs["model"])
        kwargs["forward_step_func"] = _forward_step(kwargs["forward_step_func"], recorder)
        with recorder.step(chunks, place()):
            return original(**kwargs)

    return run


def listed(model: Any) -> list[Any]:
    """The chunks of a model."""
    return list(model) if isinstance(model, (list, tuple)) else [model]


def _forward_step(forward_step: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    @wraps(forward_step)
    def run(*args: Any, **kwargs: Any) -> Any:
        output, loss_function = forward_step(*args, **kwargs)
        return output, loss_function and recorder.losses(loss_function)

    return run


def _optimizer_step(depth: list[Any], original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """Only the outermost of chained optimizers reports its gradient norm."""

    @wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth.append(self)
        try:
            result = original(self, *args, **kwargs)
        finally:
            depth.pop()
        if not depth and isinstance(result, tuple) and len(result) == 3:
            recorder.grad_norm(result[1])
        return result

    return step


def place() -> dict[str, int]:
    """This rank's coordinates in Megatron's groups, and their sizes."""
    from megatron.core import parallel_state

    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "tp_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "pp_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_rank(),
        "cp_size": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_rank(),
    }


def layout(ours: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How a Recorder finds the positions of a rank's tokens, and how it restores their order in an output."""
    return (our_positions, our_rows) if ours else (their_positions, lambda output: output)


def our_positions(local_length: int, batch: list[Any]) -> tuple[torch.Tensor, int]:
    """(positions of this rank's tokens, whole length) from the record of the current batch; see Recorder."""
    from mindspeed_cp import megatron_adaptor

    state = megatron_adaptor.state()
    if state.cp_size == 1:
        return torch.arange(local_length), local_length
    cp_rank = place()["cp"]
    # Numbers that identify rank and row; gathering them with the batch's layout gives the order of all rows.
    marks = torch.arange(local_length, dtype=torch.float64, device=_device(batch)) + cp_rank * MANY
    for of in [value for value in batch if _leads(value)] + [None]:
        try:
            whole = state.gather_sequence(marks, of=of, dim=0)
        except ValueError:  # raised on all ranks alike, because all hold parts of the same batch
            continue
        places = [(int(mark) % MANY, at) for at, mark in enumerate(whole.tolist()) if mark // MANY == cp_rank]
        return torch.tensor([at for _, at in sorted(places)]), len(whole)
    # A pipeline stage without a batch uses the configuration's layout, as attention does.
    total = _total(local_length)
    return state.layout(total).positions(cp_rank), total


def our_rows(output: torch.Tensor) -> torch.Tensor:
    """Restore the batch's own layout in the output of a layer for which rows were moved; see Recorder."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.linear.rows import conversion, exchange_rows

    record = megatron_adaptor.state().active
    if record is None or record.moved_from is None or record.scope is None or not output.dim():
        return output
    moved, link = record.layout, record.scope.groups.cp
    if link is None or output.size(0) != moved.length(link.rank):
        return output
    return exchange_rows(output.detach(), conversion(moved, record.moved_from), link, "watched")


def _leads(value: Any) -> bool:
    packed = getattr(value, "qkv_format", None) == "thd"
    return packed or (isinstance(value, torch.Tensor) and value.dim() == 2)


def their_positions(local_length: int, batch: list[Any]) -> tuple[torch.Tensor, int]:
    """The same for context parallelism of others: by the batch's position ids if they count the whole sequence, else
    by Megatron's convention: zigzag over the row, or over each document of a packed batch.
    """
    here = place()
    size, rank = here["cp_size"], here["cp"]
    counted = _counted(local_length, batch) if size > 1 else None
    if counted is not None:
        return counted, local_length * size
    packed = next((value for value in batch if getattr(value, "qkv_format", None) == "thd"), None)
    if packed is None:
        ends = [0, local_length * size]
    else:
        padded = getattr(packed, "cu_seqlens_q_padded", None)
        ends = [int(end) for end in (packed.cu_seqlens_q if padded is None else padded).flatten().tolist()]
    return zigzag(ends, size, rank), ends[-1]


def _counted(local_length: int, batch: list[Any]) -> torch.Tensor | None:
    """The batch's row of integers that holds, over all context-parallel ranks, each position of the sequence once."""
    from megatron.core import parallel_state

    group, size = parallel_state.get_context_parallel_group(), place()["cp_size"]
    for value in reversed(batch):  # position ids come after tokens, which may count up as well
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.dim() == 2:
            rows = [torch.empty_like(value[0]) for _ in range(size)]
            dist.all_gather(rows, value[0].contiguous(), group=group)
            whole = torch.cat(rows)
            if torch.equal(whole.sort().values, torch.arange(local_length * size, device=whole.device)):
                return value[0].cpu()
    return None


def zigzag(ends: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Positions of a rank if every piece between two ``ends`` is a separate zigzag."""
    pieces = []
    for start, stop in zip(ends[:-1], ends[1:]):
        part = (stop - start) // (2 * size)
        for chunk in (rank, 2 * size - 1 - rank) if size > 1 else (0, 1):
            pieces.append(torch.arange(start + chunk * part, start + (chunk + 1) * part))
    return torch.cat(pieces)


def _total(local_length: int) -> int:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    total = torch.tensor([local_length], device="cpu" if dist.get_backend(group) == "gloo" else _device([]))
    dist.all_reduce(total, group=group)
    return int(total)


def _device(batch: list[Any]) -> Any:
    found = [value.device for value in batch if isinstance(value, torch.Tensor)]
    return found[0] if found else torch.cuda.current_device()
