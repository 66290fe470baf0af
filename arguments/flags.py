"""Adds the flags of all declared settings to a parser, which then records the flags that were given."""

import argparse
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from mindspeed_cp.arguments.declared import declared, our_flags
from mindspeed_cp.arguments.mindspeed_flags import GROUP_TITLE as ACCEPTED_TITLE
from mindspeed_cp.arguments.mindspeed_flags import refuse_alibi
from mindspeed_cp.arguments.yaml_file import apply_config_file, known_keys
from mindspeed_cp.settings.setting import Setting

GROUP_TITLE = "context parallelism (mindspeed_cp)"
_NOT_GIVEN = object()
_MARK = "reads_cp_config"


def add_context_parallel_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every context-parallel flag that ``parser`` lacks, in one group; returns the parser.

    A wrong value ends the program with exit status 2 and one line, without the usage of all of Megatron's flags that
    argparse would print before it. Calling this twice changes nothing.
    """
    if hasattr(parser, _MARK):
        return parser
    _add(parser, GROUP_TITLE, our_flags())
    _add(parser, ACCEPTED_TITLE, [each for each in declared() if each.ours and each.without_effect])
    refuse_alibi(parser, _fail)
    _record_given(parser)
    return parser


def help_of(each: Setting) -> str:
    """The flag's line in --help."""
    if each.without_effect:
        return f"accepted, and reported once: {each.without_effect}."
    choices = "; ".join(f"{name}: {does}" if does else name for name, does in each.meanings_by_choice.items())
    some = f" Choices: {choices}." if choices else ""
    return f"{each.help}. Default: {each.default_said}.{some} Rule: {each.rule}."


def _add(parser: argparse.ArgumentParser, title: str, settings: list[Setting]) -> None:
    free = [each for each in settings if each.flag not in parser._option_string_actions]
    if not free:
        return
    group = parser.add_argument_group(title)
    for each in free:
        names = [name for name in each.flags if name not in parser._option_string_actions]
        group.add_argument(*names, dest=each.dest, default=each.unset, help=help_of(each), **_options(parser, each))


def _options(parser: argparse.ArgumentParser, each: Setting) -> dict[str, Any]:
    if each.switch:
        return {"action": "store_true"}
    if not each.takes:
        return {"type": _converter(parser, each), "choices": list(each.choices)}
    metavar = f"{{{','.join([*each.choices, each.takes])}}}" if each.choices else each.takes
    return {"type": _converter(parser, each), "metavar": metavar}


def _converter(parser: argparse.ArgumentParser, each: Setting) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return each.value_of(text)
        except ValueError as error:
            _fail(parser, str(error))

    return convert


def watched() -> set[str]:
    """The names whose flags are recorded: a given flag wins over a file or another flag that sets the same thing."""
    return {each.dest for each in known_keys().values()} | {"cp_comm_type", "context_parallel_algo"}


def _record_given(parser: argparse.ArgumentParser) -> None:
    """Make ``parser`` record in ``cp_given`` which names were given, and apply --cp-config FILE, at every parse.

    The hook replaces ``parse_known_args``, which all ways of parsing call; a second parse distinguishes a flag given
    with its default from an absent one. ``cp_given`` is a list of names, because Megatron writes its arguments to
    checkpoints and reads only plain values back.
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
                _fail(parser, str(error))
        return result, rest

    setattr(parser, "parse_known_args", parse_known_args)  # noqa: B010
    setattr(parser, _MARK, True)


def _fail(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(2, f"{parser.prog}: error: {message}\n")
