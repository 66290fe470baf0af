"""One all-to-all of any tensor along two of its dimensions, and the checks of its arguments."""

import torch
import torch.distributed as dist

from mindspeed_cp.comm.link import link_of
from mindspeed_cp.comm.messages import Message, Pending
from mindspeed_cp.comm.meter import record
from mindspeed_cp.sequence.runs import split_sizes

Group = dist.ProcessGroup | None
Route = tuple[Group, int, int, int]  # process group, scatter_dim, gather_dim, gather_size


def checked_dimensions(
    input_: torch.Tensor, process_group: Group, scatter_dim: int, gather_dim: int, gather_size: int | None
) -> Route:
    """(process_group, scatter_dim, gather_dim, gather_size) with non-negative dimensions and no None.

    Raises:
        ValueError: the dimensions do not fit the tensor, or this rank's part is not its share of ``gather_size``.
    """
    if input_.dim() not in (3, 4):
        raise ValueError(
            f"all_to_all takes tensors of 3 or 4 dimensions, not {tuple(input_.shape)}; view it as one of those."
        )
    scatter_dim, gather_dim = (
        dimension(dim, input_.dim(), name) for dim, name in ((scatter_dim, "scatter_dim"), (gather_dim, "gather_dim"))
    )
    if scatter_dim == gather_dim:
        raise ValueError(
            f"scatter_dim and gather_dim are both {scatter_dim} and must differ; name the dimension to "
            "cut and the dimension to join."
        )
    world_size = dist.get_world_size(process_group)
    if gather_size is None:
        gather_size = input_.size(gather_dim) * world_size
    share = split_sizes(gather_size, world_size)[dist.get_rank(process_group)]
    if share != input_.size(gather_dim):
        raise ValueError(
            f"gather_size {gather_size} gives rank {dist.get_rank(process_group)} of {world_size} a "
            f"length of {share} on dimension {gather_dim}, and its tensor has {input_.size(gather_dim)}; "
            f"split with cal_split_sizes({gather_size}, {world_size}), or pass the sum of all lengths."
        )
    return process_group, scatter_dim, gather_dim, gather_size


def dimension(dim: int, num_dims: int, name: str) -> int:
    if not -num_dims <= dim < num_dims:
        raise ValueError(
            f"{name} {dim} does not exist in a tensor of {num_dims} dimensions; choose 0 to {num_dims - 1}."
        )
    return dim % num_dims


def exchange(tensor: torch.Tensor, group: Group, scatter_dim: int, gather_dim: int, gather_size: int) -> torch.Tensor:
    return start_exchange(tensor, group, scatter_dim, gather_dim, gather_size).wait()


def start_exchange(
    tensor: torch.Tensor, group: Group, scatter_dim: int, gather_dim: int, gather_size: int
) -> Pending[torch.Tensor]:
    """Start one all-to-all; returns a Pending of its result. A tensor whose dimension is the first is not copied."""
    link = link_of(group)
    sizes = split_sizes(tensor.size(scatter_dim), link.size)
    pieces = tensor.split(sizes, dim=scatter_dim)
    shape = list(tensor.shape)
    shape[scatter_dim], shape[gather_dim] = sizes[link.rank], gather_size
    result = tensor.new_empty(shape)
    joined = result.split(split_sizes(gather_size, link.size), dim=gather_dim)
    leaving, arriving = ([Message(((part,),), tensor.dtype) for part in parts] for parts in (pieces, joined))
    pending = link.all_to_all(leaving, arriving, "all_to_all")
    record({"all_to_all": (tensor.numel() - pieces[link.rank].numel()) * tensor.element_size()})
    return pending.then(lambda _: result)
