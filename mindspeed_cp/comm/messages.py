"""Messages between two ranks: the tensors of a message, and a transfer in flight."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch

from mindspeed_cp.kernels.base import MemoryOrder
from mindspeed_cp.kernels.merge import add_in_place

T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """A transfer in flight. ``wait`` returns its result; call it once, and in the same order on all ranks.

    The tensors of the transfer must not change before.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        """Wait until everything has been received and what was sent may change again; returns the result.

        Raises:
            RuntimeError: it was called before, or a peer is lost; the message says which rank.
        """
        finish, self._finish = self._finish, None
        if finish is None:
            raise RuntimeError("this transfer was awaited before; keep what the first wait() returned.")
        return finish()

    def then(self, function: Callable[[T], U]) -> "Pending[U]":
        """The same transfer with ``function`` applied to its result."""
        return Pending(lambda: function(self.wait()))


@dataclass(frozen=True, eq=False)
class Message:
    """Tensors that travel together: tensors to be sent, or tensors to receive into.

    Args:
        blocks: concatenated in the message. The tensors of one block, (rows, batch, heads, head_dim) with equal rows
            and batch, are interleaved row by row; a block with a single tensor may have any shape.
        dtype: dtype of the message, whatever the tensors' dtypes.
        adds: whether what is received is added to the tensors, and thus received into other memory first.
        apart: whether it travels in separate memory: sent tensors may change at once, and tensors that are received
            into change only in ``wait``.
    """

    blocks: tuple[tuple[torch.Tensor, ...], ...]
    dtype: torch.dtype
    adds: bool = False
    apart: bool = False

    @classmethod
    def joined(cls, messages: Iterable["Message"]) -> "Message":
        """Messages of the same dtype concatenated to one, in as few blocks as the tensors' memory allows."""
        messages = list(messages)
        dtype = messages[-1].dtype if messages else torch.float32
        adds, apart = any(message.adds for message in messages), any(message.apart for message in messages)
        return cls(_joined([block for message in messages for block in message.blocks]), dtype, adds, apart)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for block in self.blocks for tensor in block]

    @cached_property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.blocks[0][0].device

    @cached_property
    def in_place(self) -> torch.Tensor | None:
        """The flat message if the tensors' memory already has its form, else None."""
        if self.adds or self.apart:
            return None
        blocks = self.blocks if len(self.blocks) == 1 else _joined(self.blocks)
        if not self.numel or any(len(block) > 1 for block in blocks):
            return None
        tensors = [tensor for (tensor,) in blocks]
        if any(tensor.dtype != self.dtype or not tensor.is_contiguous() for tensor in tensors):
            return None
        return flat_memory(tensors)

    def write(self, flat: torch.Tensor) -> None:
        """Copy the tensors into the flat message."""
        if self.in_place is not None:
            flat.copy_(self.in_place)
            return
        for part, tensor in zip(self._apart(flat), self.tensors, strict=True):
            part.copy_(tensor)

    def read(self, flat: torch.Tensor) -> None:
        """Copy the flat message into the tensors, or add it to them."""
        if self.in_place is not None:
            self.in_place.copy_(flat)
            return
        for part, tensor in zip(self._apart(flat), self.tensors, strict=True):
            if self.adds:
                add_in_place(tensor, part)
            else:
                tensor.copy_(part)

    def _apart(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat message with the shapes of the tensors."""
        parts: list[torch.Tensor] = []
        sizes = [sum(tensor.numel() for tensor in block) for block in self.blocks]
        for block, part in zip(self.blocks, flat.split_with_sizes(sizes)):
            if len(block) == 1:
                parts.append(part.view(block[0].shape))
                continue
            widths = [tensor.shape[2:].numel() for tensor in block]
            row = part.view(*block[0].shape[:2], sum(widths))
            parts += [piece.unflatten(-1, tensor.shape[2:]) for piece, tensor in zip(row.split(widths, dim=-1), block)]
        return parts


def flat_memory(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The flat memory of contiguous tensors if they are adjacent in one storage, else None."""
    first = tensors[0]
    for before, after in zip(tensors, tensors[1:]):
        if before.data_ptr() + before.numel() * before.element_size() != after.data_ptr():
            return None
        if before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr():
            return None
    return first.as_strided((sum(tensor.numel() for tensor in tensors),), (1,))


def end_to_end(
    flat: torch.Tensor, shapes: Sequence[tuple[int, ...]], order: MemoryOrder | None = None
) -> tuple[torch.Tensor, ...]:
    """Adjacent tensors of these shapes in ``flat``: contiguous, or (seq, batch, heads, dim) in a memory order."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = zip(flat.split_with_sizes(sizes), shapes)
    if order != "heads":
        return tuple(part.view(shape) for part, shape in parts)
    return tuple(part.view(batch, heads, seq, dim).permute(2, 0, 1, 3) for part, (seq, batch, heads, dim) in parts)


def as_stored(tensor: torch.Tensor, order: MemoryOrder | None) -> torch.Tensor:
    """A view of (seq, batch, heads, dim) with its dimensions permuted to this memory order."""
    return tensor.permute(1, 2, 0, 3) if order == "heads" else tensor


def packed(tensors: tuple[torch.Tensor, ...], order: MemoryOrder | None = None) -> tuple[torch.Tensor, ...]:
    """The tensors (seq, batch, heads, dim), each in this memory order and adjacent, so that they can be sent without a
    copy; copies, unless they are stored like that already.
    """
    stored = [as_stored(tensor, order) for tensor in tensors]
    if all(tensor.is_contiguous() for tensor in stored) and flat_memory(stored) is not None:
        return tensors
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    copies = end_to_end(flat, [tuple(tensor.shape) for tensor in tensors], order)
    for copy, tensor in zip(copies, tensors):
        copy.copy_(tensor)
    return copies


def copy_message(source: Message, target: Message) -> None:
    """Copy a rank's message to itself."""
    if source.numel == 0:
        return
    if target.in_place is not None:
        source.write(target.in_place)
    elif source.in_place is not None:
        target.read(source.in_place)
    elif [tensor.shape for tensor in source.tensors] == [tensor.shape for tensor in target.tensors]:
        for part, tensor in zip(source.tensors, target.tensors):
            tensor.copy_(part)
    else:
        flat = source.tensors[0].new_empty(source.numel, dtype=source.dtype)
        source.write(flat)
        target.read(flat)


def _joined(blocks: Iterable[tuple[torch.Tensor, ...]]) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Merge the blocks to as few as the tensors' memory allows, without empty ones."""
    found: list[tuple[torch.Tensor, ...]] = []
    for block in blocks:
        if not any(tensor.numel() for tensor in block):
            continue
        if found and _go_on(found[-1], block):
            found[-1] = tuple(map(_with_more_rows, found[-1], block))
        else:
            found.append(block)
    return tuple(found)


def _go_on(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> bool:
    """Whether each tensor's memory continues where that of the previous block ends, row by row."""
    return len(before) == len(after) and all(
        a.dim() > 0
        and a.dtype == b.dtype
        and a.shape[1:] == b.shape[1:]
        and a.stride() == b.stride()
        and a.data_ptr() + a.shape[0] * a.stride(0) * a.element_size() == b.data_ptr()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in zip(before, after)
    )


def _with_more_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return before.as_strided((before.shape[0] + after.shape[0], *before.shape[1:]), before.stride())
