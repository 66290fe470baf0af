"""MindSpeed's setters of document boundaries, called before the batch is split.

MindSpeed uses a value until another is set. Here it applies only to the next batch; later batches use the boundaries
that they contain themselves.
"""

from typing import Any

__all__ = ["get_actual_seq_len", "get_position_ids", "set_actual_seq_len", "set_position_ids"]


def _handed() -> Any:
    from mindspeed_cp import megatron_adaptor

    return megatron_adaptor.state().handed


def set_actual_seq_len(actual_seq_len: Any) -> None:
    """Set the ends of the next batch's documents.

    Args:
        actual_seq_len: tensor or list of ascending ends without the leading 0, counted over the concatenated rows of
            the micro-batch; None removes a value that was set.
    """
    _handed().set_ends(actual_seq_len)


def get_actual_seq_len() -> Any:
    """The value that was set last, None before that."""
    return _handed().ends


def set_position_ids(position_ids: Any) -> None:
    """Store ``position_ids`` for ``get_position_ids``; the model gets its own as an argument."""
    _handed().position_ids = position_ids


def get_position_ids() -> Any:
    """The value that was set last, None before that."""
    return _handed().position_ids
