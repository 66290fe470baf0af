"""Record which flags were given; a second parse distinguishes a flag given with its default from an absent one."""

import argparse
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from mindspeed_cp.arguments.yaml_file import apply_config_file, known_keys

_NOT_GIVEN = object()
_MARK = "reads_cp_config"


def watched() -> set[str]:
    """The names whose flags are recorded: a given flag wins over a file or another flag that sets the same thing."""
    return {each.dest for each in known_keys().values()} | {"cp_comm_type", "context_parallel_algo"}


def is_installed(parser: argparse.ArgumentParser) -> bool:
    return hasattr(parser, _MARK)


def install(parser: argparse.ArgumentParser, fail: Callable[[argparse.ArgumentParser, str], NoReturn]) -> None:
    """Make ``parser`` record in ``cp_given`` which names were given, and apply --cp-config FILE, at every parse.

    The hook replaces ``parse_known_args``, which all ways of parsing call. ``fail(parser, message)`` ends the program.
    ``cp_given`` is a list of names, because Megatron writes its arguments to checkpoints and reads only plain values
    back.
    """
    parse: Callable[..., Any] = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        result, rest = parse(args, namespace)
        names = watched()
        again = parse(args, SimpleNamespace(**{name: _NOT_GIVEN for name in names}))[0]
        result.cp_given = sorted(name for name in names if getattr(again, name) is not _NOT_GIVEN)
        path = getattr(result, "cp_config", None)
        if path:
            try:
                result.cp_given += sorted(apply_config_file(result, path, result.cp_given))
            except ValueError as error:
                fail(parser, str(error))
        return result, rest

    setattr(parser, "parse_known_args", parse_known_args)  # noqa: B010
    setattr(parser, _MARK, True)
