"""Patch of multi-token prediction, which shifts tokens by one within the whole sequence."""

import inspect
from functools import wraps

import torch
import torch.distributed as dist
from mindspeed_cp.patches.documents import documents_of_packed_params
from mindspeed_cp.patches.manager import Patch

MTP = "megatron.core.transformer.multi_token_prediction"


def mtp_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{MTP}.roll_tensor",
            _roll(state),
            "multi-token prediction shifts tokens within a rank before 0.14, later across the ranks of Megatron's own "
            "zigzag",
        ),
    ]


def _roll(state):
    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def roll_tensor(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            tensor, shifts, dims, group, params = (
                given.arguments.get(name) for name in ("tensor", "shifts", "dims", "cp_group", "packed_seq_params")
            )
            # Before 0.14 there is no group to pass.
            alone = "cp_group" in signature.parameters and (group is None or group.size() == 1)
            if state.cp_size == 1 or alone:
                return original(*args, **kwargs)
            if shifts != -1:
                raise ValueError(
                    f"roll_tensor with shifts={shifts} is not supported with context parallelism; use shifts=-1."
                )
            shape = state.shape_for(tensor.size(dims))
            documents = (0, shape.seq_len) if params is None else documents_of_packed_params(params, shape.seq_len)
            whole = _rolled_whole(state, tensor, shape.seq_len, dims, documents)
            # The sum divides each rank's loss, and gradients are averaged over the ranks: with the mean of the ranks'
            # sums that is the mean over all tokens, however unevenly they are shared.
            return state.layout(shape.seq_len).shard(
                whole, state.cp_rank, dim=dims
            ).contiguous(), whole.sum() / state.cp_size

        return roll_tensor

    return build


def _rolled_whole(state, tensor, seq_len, dim, documents):
    """The whole sequence, of which ``tensor`` is this rank's part, shifted by one to the left; 0 ends each document.

    Tokens, labels and masks are small, so the whole sequence is gathered; that is right for every layout.
    """
    layout = state.layout(seq_len)
    rows = tensor.movedim(dim, 0).contiguous()
    longest = max(layout.length(rank) for rank in range(state.cp_size))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.size(0)] = rows
    gathered = [torch.empty_like(padded) for _ in range(state.cp_size)]
    dist.all_gather(gathered, padded, group=state.groups.cp_group)
    whole = layout.unshard([shard[: layout.length(rank)] for rank, shard in enumerate(gathered)])
    whole = torch.cat([whole[1:], torch.zeros_like(whole[:1])])
    for end in documents[1:]:
        if end:
            whole[end - 1] = 0
    return whole.movedim(0, dim)
