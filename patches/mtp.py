"""Patch of multi-token prediction, which shifts tokens by one within the whole sequence."""

import importlib
import inspect
from functools import wraps

import torch
import torch.distributed as dist
from mindspeed_cp.patches.manager import Patch

from mindspeed_cp.sequence.sharding import gather_sequence

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
        Patch(
            f"{MTP}.process_mtp_loss",
            _with_tokens_of_the_sequence(state),
            "from 0.17 on the loss per token counts each rank's own tokens, of which ranks may hold unequal numbers",
            lambda: "" if hasattr(importlib.import_module(MTP), "process_mtp_loss") else "this version counts nothing",
        ),
    ]


class _Counted:
    """A rank's part of a loss mask whose sum is the mean of all ranks' sums, as that of ``roll_tensor`` is."""

    def __init__(self, mask, state):
        self.mask, self._state = mask, state

    def sum(self):
        total = self.mask.sum()
        dist.all_reduce(total, group=self._state.groups.cp_group)
        return total / self._state.cp_size


def _with_tokens_of_the_sequence(state):
    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def process_mtp_loss(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            mask, labels = given.get("loss_mask"), given.get("labels")
            # Every version from 0.17 on counts, and reads the count with a loss per token alone.
            if state.cp_size > 1 and labels is not None and given["config"].calculate_per_token_loss:
                given["loss_mask"] = _Counted(torch.ones_like(labels) if mask is None else mask, state)
            return original(**given)

        return process_mtp_loss

    return build


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
            if isinstance(tensor, _Counted):
                tensor = given.arguments["tensor"] = tensor.mask
                args, kwargs = given.args, given.kwargs
            # Before 0.14 there is no group to pass.
            alone = "cp_group" in signature.parameters and (group is None or group.size() == 1)
            if state.cp_size == 1 or alone:
                return original(*args, **kwargs)
            if shifts != -1:
                raise ValueError(
                    f"roll_tensor with shifts={shifts} is not supported with context parallelism; use shifts=-1."
                )
            layout = state.micro_batch(tensor.size(dims)).layout
            documents = (0, layout.seq_len) if params is None else state.boundaries.documents(params, layout.seq_len)
            whole = _shifted(gather_sequence(tensor, groups=state.groups, layout=layout, dim=dims), dims, documents)
            # The sum divides each rank's loss, and gradients are averaged over the ranks: with the mean of the ranks'
            # sums that is the mean over all tokens, however unevenly they are shared.
            mine = layout.shard(whole, state.cp_rank, dim=dims).contiguous()
            return mine, whole.sum() / state.cp_size

        return roll_tensor

    return build


def _shifted(whole, dim, documents):
    """The whole sequence shifted by one to the left; 0 ends each document."""
    rows = whole.movedim(dim, 0)
    rows = torch.cat([rows[1:], torch.zeros_like(rows[:1])])
    rows[[end - 1 for end in documents[1:] if end]] = 0
    return rows.movedim(0, dim)
