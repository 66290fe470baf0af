"""Parse the flags that context parallelism needs from a training command, without the script's own parser."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from mindspeed_cp.arguments.declared import our_flags
from mindspeed_cp.arguments.flags import add_context_parallel_arguments

NUMBERS = (
    "num-layers",
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "micro-batch-size",
)
OPTIONAL_NUMBERS = ("seq-length", "num-attention-heads", "num-query-groups", "hidden-size", "kv-channels")
SWITCHES = (
    "group-query-attention",
    "sequence-parallel",
    "use-legacy-models",
    "multi-latent-attention",
    "bf16",
    "fp16",
    "recompute-activations",
)
CLOSE = 0.88  # an unknown flag at least this similar to a known one counts as misspelt


class _Refused(Exception):
    """A flag's value is wrong; not a ValueError, because argparse catches those of converters."""


class _RaisingParser(argparse.ArgumentParser):
    """A parser that raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; see docs/flags.md.")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Refused(str(message).partition("error: ")[2].strip())


def bare_parser(prog: str) -> argparse.ArgumentParser:
    """A parser without flags, for ``known_flags``."""
    return _RaisingParser(prog=prog, allow_abbrev=False, add_help=False)


def flag_parser(prog: str) -> argparse.ArgumentParser:
    """A parser of all flags, including Megatron's and MindSpeed's, that the rules of context parallelism read."""
    parser = bare_parser(prog)
    for flag in NUMBERS:
        parser.add_argument(f"--{flag}", type=int, default=1)
    for flag in OPTIONAL_NUMBERS:
        parser.add_argument(f"--{flag}", type=int)
    for flag in SWITCHES:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--recompute-granularity")
    parser.add_argument("--recompute-modules", nargs="*")
    parser.add_argument("--position-embedding-type")
    parser.add_argument("--cp-comm-type", nargs="+")
    parser.add_argument("--hierarchical-context-parallel-sizes", nargs="+", type=int)
    return add_context_parallel_arguments(parser)


def read_flags(argv: Sequence[str], prog: str = "launch") -> tuple[argparse.Namespace, list[str]]:
    """(the flags that context parallelism reads, the other words of the line).

    Raises:
        ValueError: the value of a flag is wrong.
    """
    return known_flags(flag_parser(prog), argv)


def known_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of a command line that a parser knows, the other words); ``parser`` comes from ``bare_parser``.

    Raises:
        ValueError: the value of a flag is wrong.
    """
    try:
        return parser.parse_known_args(list(argv))
    except _Refused as refused:
        raise ValueError(str(refused)) from None


def misspelt(rest: Sequence[str]) -> dict[str, str]:
    """Unknown flag -> the flag of context parallelism that was probably meant."""
    ours = [flag for each in our_flags() for flag in each.flags]
    given = [token.partition("=")[0] for token in rest if token.startswith("--")]
    nearest = {flag: difflib.get_close_matches(flag, ours, 1, CLOSE) for flag in given}
    return {flag: found[0] for flag, found in nearest.items() if found}
