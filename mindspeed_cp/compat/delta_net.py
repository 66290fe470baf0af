"""Names of MindSpeed's gated delta net that ms-swift imports for every model as soon as context parallelism is on."""

from typing import Any

import torch

__all__ = ["tensor_a2a_cp2hp", "tensor_a2a_hp2cp"]


def tensor_a2a_cp2hp(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """This rank's part of the sequence with all features -> the whole sequence with this rank's part of the features.

    Args:
        args, kwargs: seq_dim, head_dim, cp_group, split_sections, undo_attention_load_balancing, as in Megatron.
    """
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron import hidden_exchange

    return hidden_exchange.tensor_a2a_cp2hp(megatron_adaptor.state(), tensor, *args, **kwargs)


def tensor_a2a_hp2cp(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The inverse of ``tensor_a2a_cp2hp``, with redo_attention_load_balancing."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron import hidden_exchange

    return hidden_exchange.tensor_a2a_hp2cp(megatron_adaptor.state(), tensor, *args, **kwargs)
