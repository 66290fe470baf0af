"""What one attention layer keeps for its backward pass, counted on tensors without memory that the engine makes."""

import torch

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels.base import MemoryOrder
from mindspeed_cp.planner.trace import Notes, Problem, dry_call


def saved_bytes(config: ContextParallelConfig, problem: Problem, rank: int, order: MemoryOrder | None = None) -> int:
    """Bytes that cp_rank ``rank`` keeps from the forward to the backward pass of one layer, every storage once.

    Query, key, value and out are part of it; what projections and other parts of the layer keep is not.

    Args:
        order: as the kernel asks; it decides which tensors share memory.
    """
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = dry_call(config, problem, rank, Notes(), order)()
    assert out.requires_grad, "the graph holds what was saved until here"
    return sum(saved.values())
