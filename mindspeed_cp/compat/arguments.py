"""MindSpeed's ``process_args``, which adds the flags of context parallelism to any parser."""

import argparse

from mindspeed_cp.arguments import add_context_parallel_arguments

__all__ = ["process_args"]


def process_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that ``parser`` lacks, only those of MindSpeed's context parallelism; returns ``parser``."""
    added: argparse.ArgumentParser = add_context_parallel_arguments(parser)
    return added
