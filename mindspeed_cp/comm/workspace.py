"""Reused flat buffers: page faults on fresh large buffers cost more than the copies into them."""

import math

import torch


class Workspace:
    """Named buffers that grow to the largest request and are handed out again; contents are undefined.

    A name is free again when the transfer or computation that used it has ended: forward and backward of a layer leave
    nothing in flight, so layers share them.
    """

    def __init__(self):
        self._buffers = {}

    def get(self, name, shape, dtype, device):
        """A contiguous tensor of ``shape`` that shares memory with earlier tensors of the same name and dtype."""
        count, key = math.prod(shape), (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):  # a buffer made during inference could not be written during training
                buffer = self._buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)

    @property
    def num_bytes(self):
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def clear(self):
        self._buffers.clear()
