"""Patches of models that compute the positions of their tokens from a rank's own tokens."""

from collections.abc import Callable
from typing import Any

import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import record_of_length
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.patches.computing import COMPUTING_OVER
from mindspeed_cp.patches.rows import patch

T5 = "megatron.core.models.T5.t5_model"
REASON = "learned positions count from the first token that a rank holds, and not from that of the sequence"


@patch(f"{T5}.T5Model.forward", reason="t5_position_ids makes positions without knowing the model")
def t5_model(adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    with COMPUTING_OVER.set(adaptor.scope_of(self)):
        return original(self, *args, **kwargs)


@patch("megatron.core.models.bert.bert_model.BertModel.bert_position_ids", reason=REASON)
def bert_position_ids(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, token_ids: torch.Tensor
) -> torch.Tensor:
    scope = adaptor.scope_of(self)
    return original(self, token_ids) if scope.alone else _positions(adaptor, scope, token_ids)


@patch(f"{T5}.t5_position_ids", reason=REASON)
def t5_position_ids(adaptor: Adaptor, original: Callable[..., Any], token_ids: torch.Tensor) -> torch.Tensor:
    scope = COMPUTING_OVER.get()
    return original(token_ids) if scope is None or scope.alone else _positions(adaptor, scope, token_ids)


def _positions(adaptor: Adaptor, scope: Scope, token_ids: torch.Tensor) -> torch.Tensor:
    """(b, s), the positions of this rank's tokens in the whole sequence."""
    layout = record_of_length(adaptor, scope, token_ids.size(1)).layout
    return layout.positions(scope.rank, token_ids.device).expand_as(token_ids)
