"""Hands over where documents end as MindSpeed does: by a value that is set before its batch is split.

MindSpeed keeps it until another is set. Here it belongs to the next batch alone: that batch's documents end there, and
later batches go by what they bring themselves.
"""

from typing import Any

__all__ = ["get_actual_seq_len", "get_position_ids", "set_actual_seq_len", "set_position_ids"]


def _handed() -> Any:
    from mindspeed_cp import megatron_adaptor

    return megatron_adaptor.state().handed


def set_actual_seq_len(actual_seq_len: Any) -> None:
    """Say where the documents of the next batch end.

    Args:
        actual_seq_len: tensor or list of ascending ends, over the rows of the micro-batch one after another, without
            the leading 0; None takes it back.
    """
    _handed().set_ends(actual_seq_len)


def get_actual_seq_len() -> Any:
    """What was set last, None before that."""
    return _handed().ends


def set_position_ids(position_ids: Any) -> None:
    """Keep ``position_ids`` for ``get_position_ids``; the model gets its own as an argument."""
    _handed().position_ids = position_ids


def get_position_ids() -> Any:
    """What was set last, None before that."""
    return _handed().position_ids
