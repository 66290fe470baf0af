"""A setting is one field of a dataclass; the field declares its meaning, all its names, and which algorithms use it.

Parser, conversion, MindFormers' file, frameworks' settings, the comparison of ranks, the planner's flags and the table
of docs/flags.md use the declaration, so a new setting is one field, and a rule if it depends on other settings.
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
BY_NAME = "--"  # the flag has the field's name


@dataclass(frozen=True)
class Setting:
    """A field's declaration; ``name``, ``default``, ``literals``, ``whole`` and ``switch`` come from the field itself.

    Args:
        flag: the flag that sets it, also its name in messages; "" for none, BY_NAME for the field's name.
        help: what it is. rule: what it requires. Both are sentences without a final period.
        meanings: choice -> what it does, or a function that returns this (for a table that may grow).
        also: further flags that set it.
        keys: MindFormers' keys that set it, "section.key".
        names: further names in namespaces and dicts; if there is no flag, the first is its name.
        least: smallest whole number; ``least_means`` says what it means.
        takes: the value in help and documentation, if there are no choices.
        default_text: the default in help and documentation, if the value itself does not say it.
        taken_by: whether an algorithm uses it; if not, ``ignored`` says why, with {algorithm} for the flag and its
            value, and {takers} for the algorithms that use it.
        by_layer: given if layers may have values of their own (--cp-layer-algo); whether an algorithm uses the setting.
            A layer whose algorithm does not use it has the default.
        parse: text -> value, raises ValueError; by default choices, whole numbers or any text.
        agree: whether all ranks must have the same value.
        ours: whether this project's parser adds the flag; else Megatron's does.
        shares: whether it only determines how the sequence is split, not what is computed.
        variable: the variable of the launch scripts that sets it.
        see: a link for the documentation.
        without_effect: why it has no effect here.
        read: a framework's value -> value, if it is neither text, number nor switch.
        unset: the value if none is given, if this is not the field's default.
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
    by_layer: Callable[[Algorithm], bool] | None = None
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
        """argparse's name of the flag, which is also the name in namespaces and dicts."""
        return self.flag.removeprefix("--").replace("-", "_") or (self.names[0] if self.names else self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag, *self.also)

    @property
    def label(self) -> str:
        """The name in messages: the flag, else the key in files."""
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
        """Check the value of a field, independent of other fields.

        Raises:
            ValueError: the value is not one of the choices, or not a number in the allowed range.
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
        """Why ``algorithm`` ignores ``value``; "" if it uses it, or if the value is the default."""
        if self.taken_by is None or value == self.default or self.taken_by(ALGORITHMS[algorithm]):
            return ""
        why = self.ignored.format(algorithm=f"--context-parallel-algo {algorithm}", takers=self.algorithms(True))
        return f"{self.label}{'' if value is True else f' {value}'} is ignored: {why}."

    def algorithms(self, taking: bool, between: str = " or ") -> str:
        """The algorithms that use this setting, or those that do not, as text."""
        asked = self.taken_by or (lambda row: True)
        return between.join(name for name, row in ALGORITHMS.items() if bool(asked(row)) == taking)

    def said(self, value: Any) -> str:
        """The flag with ``value``, to paste; "" if the flag is omitted for this value."""
        if not self.flag or value is None or value is False:
            return ""
        return self.flag if self.switch else f"{self.flag} {value}"


def setting(default: Value, *, flag: str = "", **declared: Any) -> Value:
    """A dataclass field with a declaration; the arguments are those of ``Setting``."""
    declaration = Setting(flag=flag, default=default, **{"unset": default, **declared})
    return field(default=default, metadata={_KEY: declaration})


def megatrons(default: Value, *, flag: str = BY_NAME, **declared: Any) -> Value:
    """A field for a flag of Megatron's parser, by default with the field's name."""
    return setting(default, flag=flag, ours=False, **declared)


def declarations(owner: type) -> tuple[Setting, ...]:
    """The declarations of a dataclass's fields, in order."""
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
    """Choices, numbers and switches that a field's type permits."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = tuple(choice for each in members if get_origin(each) is Literal for choice in get_args(each))
    return {"literals": literals, "whole": int in members, "switch": bool in members}
