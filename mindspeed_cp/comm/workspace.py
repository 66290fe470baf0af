"""Reused flat buffers, because page faults on new large buffers cost more than the copies into them."""

import math
from collections.abc import Sequence

import torch


class Workspace:
    """Named buffers that grow to the largest request and are reused; their contents are undefined.

    A name can be reused when the transfer or computation that used it has ended: forward and backward of a layer leave
    nothing in flight, so layers share the buffers. A transfer borrows its temporary buffers and gives them back.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self._lent_bytes = 0

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor of ``shape`` that shares memory with earlier tensors of the same name and dtype."""
        count, key = math.prod(shape), (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[key] = _flat(count, dtype, device)
        return buffer[:count].view(shape)

    def borrow(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat tensor of at least ``count`` elements for exclusive use until ``give_back``."""
        alike = [buffer for buffer in self._free if buffer.dtype == dtype and buffer.device == device]
        alike.sort(key=torch.Tensor.numel)
        lent = next((buffer for buffer in alike if buffer.numel() >= count), None)  # the smallest that is large enough
        for buffer in alike[-1:] if lent is None else [lent]:  # a buffer that is too small is replaced
            self._free = [other for other in self._free if other is not buffer]
        lent = _flat(count, dtype, device) if lent is None else lent
        self._lent_bytes += _num_bytes(lent)
        return lent

    def give_back(self, lent: torch.Tensor) -> None:
        """Return a tensor from ``borrow``, whose contents may be overwritten from now on."""
        self._lent_bytes -= _num_bytes(lent)
        self._free.append(lent)

    @property
    def num_bytes(self) -> int:
        return self._lent_bytes + sum(map(_num_bytes, [*self._buffers.values(), *self._free]))

    def clear(self) -> None:
        self._buffers.clear()
        self._free.clear()


def _flat(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a buffer made during inference could not be written during training
        return torch.empty(count, dtype=dtype, device=device)


def _num_bytes(buffer: torch.Tensor) -> int:
    return buffer.numel() * buffer.element_size()
