"""A setting is one field of a dataclass; the field declares what it is, all its names, and who reads it.

Parser, conversion, MindFormers' file, frameworks' settings, the comparison of ranks, the planner's lines and the table
of docs/flags.md read the declaration, so that a new setting is one field, and one rule where it needs other settings.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mindspeed_cp.settings.algorithms import ALGORITHMS, Algorithm
from mindspeed_cp.settings.rules import listed, require

Value = TypeVar("Value")
_KEY = "setting"
BY_NAME = "--"  # the flag of the field's name


@dataclass(frozen=True)
class Setting:
    """What a field declares; ``name``, ``default``, ``literals``, ``whole`` and ``switch`` come from the field itself.

    Args:
        flag: the flag that sets it, also its name in messages; "" for none, BY_NAME for the one named as the field.
        help: what it is. rule: what it asks for. Both are sentences without their last period.
        meanings: choice -> what it does, or a function that returns this (a table that grows).
        also: further flags that set the same.
        keys: MindFormers' keys that set the same, "section.key".
        names: further names in namespaces and dicts; the first is that of a setting without a flag.
        least: smallest whole number, and in ``least_means`` what to know about it.
        takes: the value in help and documentation, where it is no choice.
        default_text: the default in help and documentation, where its value does not say it.
        taken_by: whether an algorithm reads it; where it does not, ``ignored`` says why: {algorithm} is the flag with
            its value, {takers} those that do.
        parse: text -> value, which raises ValueError; by default choices, whole numbers or any text.
        agree: all ranks must have the same value.
        ours: this project's parser adds the flag; else Megatron's does.
        shares: it says how the sequence is shared, and nothing of what is computed.
        variable: the variable of the launch scripts that sets it.
        see: a link for the documentation.
        without_effect: why it changes nothing here.
        read: a framework's value -> value, where it is neither text, number nor switch.
        unset: the value where nobody says one, when that is not the field's default.
    """

    flag: str = ""
    help: str = ""
    rule: str = ""
    meanings: Mapping[str, str] | Callable[[], Mapping[str, str]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    least: int | None = None
    least_means: str = ""
    takes: str = ""
    default_text: str = ""
    taken_by: Callable[[Algorithm], bool] | None = None
    ignored: str = ""
    parse: Callable[[str], Any] | None = None
    agree: bool = True
    ours: bool = True
    shares: bool = True
    variable: str = ""
    see: str = ""
    without_effect: str = ""
    read: Callable[[Any], Any] | None = None
    unset: Any = None
    name: str = ""
    default: Any = None
    literals: tuple[str, ...] = ()
    whole: bool = False
    switch: bool = False

    @property
    def dest(self) -> str:
        """The flag as argparse stores it, which is the name in namespaces and dicts."""
        return self.flag.removeprefix("--").replace("-", "_") or (self.names[0] if self.names else self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag, *self.also)

    @property
    def label(self) -> str:
        """The name in messages: the flag's, else the file's."""
        return self.flag or (self.keys[0].rpartition(".")[2] if self.keys else self.name)

    @property
    def choices(self) -> tuple[str, ...]:
        return self.literals or tuple(self.meanings_by_choice)

    @property
    def meanings_by_choice(self) -> Mapping[str, str]:
        return self.meanings() if callable(self.meanings) else self.meanings

    @property
    def default_said(self) -> str:
        return self.default_text or ("off" if self.switch else "none" if self.unset is None else str(self.unset))

    def value_of(self, text: str) -> Any:
        """Convert the text of a command line.

        Raises:
            ValueError: the text is wrong; the message names flag, text and what to write.
        """
        if self.parse is not None:
            return self.parse(text)
        choices = self.choices
        if text in choices or not (choices or self.whole):
            return text
        if not self.whole:
            raise ValueError(f"{self.flag} {text} is not known; choose one of {', '.join(choices)}.")
        least = self.least if self.least is not None else -1
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            others = f", or one of {', '.join(choices)}" if choices else ""
            raise ValueError(
                f"{self.flag} {text} must be a whole number of at least {least}{others}; try {self.flag} "
                f"{max(least, 1)}."
            )
        return int(text)

    def check(self, value: Any) -> None:
        """Check the value of a field by itself.

        Raises:
            ValueError: the value is none of the choices, or no number in the allowed range.
        """
        if self.switch or (value is None and self.default is None) or value in self.choices:
            return
        if self.whole:
            least = self.least if self.least is not None else -1
            numbers = f"of at least {least}" if least else "of 0 or more"
            others = f", or {listed(self.choices)}" if self.choices else ""
            valid = isinstance(value, int) and value >= least
            require(valid, f"{self.label} {value} must be a whole number {numbers}{others}; {self.least_means}.")
        elif self.choices:
            some = f"choose one of {', '.join(self.choices)}"
            way_out = some if self.default is not None else f"choose {listed(self.choices)}, or leave it out"
            raise ValueError(f"{self.label} {value} is not known; {way_out}.")

    def notice(self, value: Any, algorithm: str) -> str:
        """Why ``algorithm`` ignores ``value``; "" where it reads it, or where it is the default."""
        if self.taken_by is None or value == self.default or self.taken_by(ALGORITHMS[algorithm]):
            return ""
        why = self.ignored.format(algorithm=f"--context-parallel-algo {algorithm}", takers=self.algorithms(True))
        return f"{self.label}{'' if value is True else f' {value}'} is ignored: {why}."

    def algorithms(self, taking: bool, between: str = " or ") -> str:
        """The algorithms that read this setting, or those that do not, as text."""
        asked = self.taken_by or (lambda row: True)
        return between.join(name for name, row in ALGORITHMS.items() if bool(asked(row)) == taking)

    def said(self, value: Any) -> str:
        """The flag with ``value``, to paste; "" where the flag is left out for it."""
        if not self.flag or value is None or value is False:
            return ""
        return self.flag if self.switch else f"{self.flag} {value}"


def setting(default: Value, *, flag: str = "", **declared: Any) -> Value:
    """A dataclass field with its declaration; the arguments are those of ``Setting``."""
    declaration = Setting(flag=flag, default=default, **{"unset": default, **declared})
    return field(default=default, metadata={_KEY: declaration})


def megatrons(default: Value, *, flag: str = BY_NAME, **declared: Any) -> Value:
    """The field of a flag that Megatron's parser has, by default that of the field's name."""
    return setting(default, flag=flag, ours=False, **declared)


def declarations(owner: type) -> tuple[Setting, ...]:
    """The declarations of a dataclass's fields, in their order."""
    return _declarations(owner)


@cache
def _declarations(owner: Hashable) -> tuple[Setting, ...]:
    assert isinstance(owner, type) and dataclasses.is_dataclass(owner)
    hints = get_type_hints(owner)
    found = []
    for each in dataclasses.fields(owner):
        if _KEY in each.metadata:
            declared: Setting = each.metadata[_KEY]
            flag = f"--{each.name.replace('_', '-')}" if declared.flag == BY_NAME else declared.flag
            found.append(dataclasses.replace(declared, name=each.name, flag=flag, **_kind(hints[each.name])))
    return tuple(found)


def _kind(hint: Any) -> dict[str, Any]:
    """Choices, numbers and switches that a field's type allows."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = tuple(choice for each in members if get_origin(each) is Literal for choice in get_args(each))
    return {"literals": literals, "whole": int in members, "switch": bool in members}
