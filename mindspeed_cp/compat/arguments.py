"""MindSpeed's ``process_args``: the flags of context parallelism, added to any parser."""

from mindspeed_cp.arguments import add_context_parallel_arguments

__all__ = ["process_args"]


def process_args(parser):
    """Add the flags that ``parser`` does not have yet, those of MindSpeed's context parallelism alone; returns it."""
    return add_context_parallel_arguments(parser)
