"""Which flags the command line gives: a second parse tells a flag given with its default from an absent one."""

import argparse
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from mindspeed_cp.arguments.yaml_file import apply_config_file, known_keys

_NOT_GIVEN = object()
_MARK = "reads_cp_config"


def watched() -> set[str]:
    """The names whose flags are watched: where a flag and the file, or two flags, say the same thing, the one that was
    given wins.
    """
    return {each.dest for each in known_keys().values()} | {"cp_comm_type", "context_parallel_algo"}


def is_installed(parser: argparse.ArgumentParser) -> bool:
    return hasattr(parser, _MARK)


def install(parser: argparse.ArgumentParser, fail: Callable[[argparse.ArgumentParser, str], NoReturn]) -> None:
    """Make ``parser`` note in ``cp_given`` which names were given, and apply --cp-config FILE, at every parse.

    The hook sits on ``parse_known_args``, through which every way of parsing goes. ``fail(parser, message)`` ends the
    program. The note is a list of names: Megatron writes its arguments into checkpoints, and reads them back as plain
    values alone.
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
