"""Patches of multi-token prediction, which shifts tokens by one within the whole sequence."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import record_of_length
from mindspeed_cp.megatron.layer_numbers import number_behind
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.patches.computing import COMPUTING_OVER
from mindspeed_cp.patches.rows import absent, arguments_of, patch, signature_of
from mindspeed_cp.sequence.sharding import gather_sequence

MTP = "megatron.core.transformer.multi_token_prediction"


class Counted:
    """A rank's part of a loss mask whose sum is the mean of the ranks' true counts.

    Args:
        mask: the loss mask times the number of ranks. Megatron divides by the mean of the ranks' sums, at least 1; this
            mean is then the count of the whole sequence, and at least 1 if there is any target.
    """

    def __init__(self, mask: torch.Tensor, scope: Scope) -> None:
        self.mask, self._scope = mask * scope.size, scope

    def sum(self) -> torch.Tensor:
        total = self.mask.sum()
        dist.all_reduce(total, group=self._scope.group)
        return total / self._scope.size**2


@patch(
    f"{MTP}.process_mtp_loss",
    reason="from 0.17 on the per-token loss counts each rank's own tokens, whose numbers may differ, and every loss "
    "divides by at least one token per rank",
    when=absent(f"{MTP}.process_mtp_loss", "this version counts nothing"),
)
def process_mtp_loss(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = arguments_of(original, args, kwargs)
    scope = adaptor.scope_of(SimpleNamespace(config=given["config"], cp_group=given.get("cp_group")))
    labels: torch.Tensor | None = given.get("labels")
    tokens: torch.Tensor | None = given.get("input_ids") if labels is None else labels
    if scope.alone or tokens is None:
        return original(*args, **kwargs)
    mask = torch.ones_like(tokens) if given.get("loss_mask") is None else given["loss_mask"]
    if labels is None:  # as in reinforcement learning: the next token is the label, and the last token has none
        shift = importlib.import_module(MTP).roll_tensor
        how = {name: given.get(name) for name in ("cp_group", "packed_seq_params")} | {"shifts": -1, "dims": -1}
        labels, mask = shift(tokens, **how)[0], shift(mask, **how)[0]
    counted = Counted(mask, scope)
    # Every version from 0.17 on counts tokens, but uses the count only with a per-token loss.
    per_token = given["config"].calculate_per_token_loss
    return original(**given | {"labels": labels, "loss_mask": counted if per_token else counted.mask})


@patch(
    f"{MTP}.MultiTokenPredictionBlock.__init__",
    reason="its layers get the settings of layers after the last one, whatever numbers this version gives them",
)
def multi_token_prediction_layers(
    adaptor: Adaptor, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, *args, **kwargs)
    for layer in self.layers:
        number_behind(layer)


@patch(
    f"{MTP}.MultiTokenPredictionBlock.forward",
    reason="before 0.14 the function below has no argument for the group",
)
def multi_token_prediction_block(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    with COMPUTING_OVER.set(adaptor.scope_of(self)):
        return original(self, *args, **kwargs)


@patch(
    f"{MTP}.roll_tensor",
    reason="multi-token prediction shifts tokens within a rank before 0.14, later across the ranks of Megatron's own "
    "zigzag",
)
def roll_tensor(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = arguments_of(original, args, kwargs)
    if isinstance(given["tensor"], Counted):
        given["tensor"] = given["tensor"].mask
    tensor, params = given["tensor"], given.get("packed_seq_params")
    # Before 0.14 there is no group to pass; later none means that the tensor is whole, and before that, that a batch is
    # shifted before it is split, outside of the model, as MindSpeed-LLM does.
    has_group = "cp_group" in signature_of(original).parameters
    scope = adaptor.scopes.of(given.get("cp_group")) if has_group else COMPUTING_OVER.get() or adaptor.scopes.alone
    if scope.alone or tensor is None:
        return original(**given)
    if given.get("shifts", -1) != -1:
        raise ValueError(
            f"roll_tensor with shifts={given['shifts']} is not supported with context parallelism; use shifts=-1."
        )
    dim = given.get("dims", -1)
    layout = record_of_length(adaptor, scope, tensor.size(dim), params).layout
    documents = (0, layout.seq_len) if params is None else adaptor.boundaries.documents(params, layout.seq_len)
    whole = _shifted(gather_sequence(tensor, groups=scope.groups, layout=layout, dim=dim), dim, documents)
    # Each rank's loss is divided by this sum, and gradients are averaged over the ranks; the mean of the ranks' sums
    # therefore gives the mean over all tokens, also for uneven lengths.
    return layout.shard(whole, scope.rank, dim=dim).contiguous(), whole.sum() / scope.size


def _shifted(whole: torch.Tensor, dim: int, documents: tuple[int, ...]) -> torch.Tensor:
    """The whole sequence shifted left by one, with 0 at the end of each document."""
    rows = whole.movedim(dim, 0)
    rows = torch.cat([rows[1:], torch.zeros_like(rows[:1])])
    rows[[end - 1 for end in documents[1:] if end]] = 0
    return rows.movedim(0, dim)
