"""MindSpeed's ``process_args``: the flags of context parallelism, added to any parser."""

import argparse

from mindspeed_cp.arguments import add_context_parallel_arguments

__all__ = ["process_args"]


def process_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that ``parser`` does not have yet, those of MindSpeed's context parallelism alone; returns it."""
    added: argparse.ArgumentParser = add_context_parallel_arguments(parser)
    return added
