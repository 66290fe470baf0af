"""Adds the flags of all declared settings to a parser, in one argparse group."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from mindspeed_cp.arguments import given
from mindspeed_cp.arguments.declared import declared, our_flags
from mindspeed_cp.arguments.mindspeed_flags import GROUP_TITLE as ACCEPTED_TITLE
from mindspeed_cp.arguments.mindspeed_flags import refuse_alibi
from mindspeed_cp.settings.setting import Setting

GROUP_TITLE = "context parallelism (mindspeed_cp)"


def add_context_parallel_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every context-parallel flag that ``parser`` lacks, in one group; returns the parser.

    A wrong value ends the program with exit status 2 and one line, without the usage of all of Megatron's flags that
    argparse would print before it. Calling this twice changes nothing.
    """
    if given.is_installed(parser):
        return parser
    _add(parser, GROUP_TITLE, our_flags())
    _add(parser, ACCEPTED_TITLE, [each for each in declared() if each.ours and each.without_effect])
    refuse_alibi(parser, _fail)
    given.install(parser, _fail)
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


def _fail(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(2, f"{parser.prog}: error: {message}\n")
