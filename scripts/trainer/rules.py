"""Rules for the values of flags. A rule converts the text of the command line to a value, or says what would work."""

import argparse
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from mindspeed_cp.settings.rules import tokens

LARGEST = 2**31 - 1
GRACE = 4.0  # seconds before other ranks complain, because rank 0 has most of the same errors and prints them first


@dataclass(frozen=True)
class Rule:
    """One kind of value.

    Args:
        says: the rule's text in errors, such as "a whole number of at least 1".
        example: a valid value.
        convert: text -> value; raises ValueError if the text violates the rule.
        metavar: the value's name in --help.
        choices: the only valid values, or None.
    """

    says: str
    example: str
    convert: Callable[[str], Any]
    metavar: str
    choices: tuple[str, ...] | None = None

    def of(self, flag: str) -> Callable[[str], Any]:
        """The converter that argparse calls with the text after ``flag``."""

        def convert(text):
            try:
                return self.convert(text)
            except ValueError:
                raise argparse.ArgumentTypeError(
                    f"{flag} {text or repr(text)} must be {self.says}; use {flag} {self.example}."
                ) from None

        return convert


def _only(condition: Any, value: Any) -> Any:
    if not condition:
        raise ValueError
    return value


def whole(minimum: int, maximum: int = LARGEST) -> Rule:
    """A whole number from ``minimum`` to ``maximum``, both included."""
    upper = "" if maximum == LARGEST else f" and at most {maximum}"
    return Rule(
        f"a whole number of at least {minimum}{upper}",
        str(max(minimum, 1)),
        lambda text: _only(re.fullmatch(r"[+-]?[0-9]+", text) and minimum <= int(text) <= maximum, int(text)),
        "N",
    )


def length() -> Rule:
    """Tokens of a sequence: a whole number of at least 1, also in forms such as 128k and 1m."""
    says = "a whole number of at least 1, or such as 4k"
    return Rule(says, "1024", lambda text: _only(text == text.strip() and tokens(text) <= LARGEST, tokens(text)), "N")


def real(low: float, high: float = math.inf, *, example: str, open_low: bool = False, open_high: bool = False) -> Rule:
    """A finite number from ``low`` to ``high``; an open end is excluded."""

    def convert(text):
        value = float(text)
        is_end = open_low and value == low or open_high and value == high
        return _only(math.isfinite(value) and low <= value <= high and not is_end, value)

    lower = f"above {low:g}" if open_low else f"of at least {low:g}"
    upper = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
    return Rule(f"a finite number {lower}{upper}", example, convert, "X")


def one_of(*names: str) -> Rule:
    listed = "{" + ",".join(names) + "}"
    return Rule(f"one of {', '.join(names)}", names[0], lambda text: _only(text in names, text), listed, names)


def path(example: str, metavar: str = "FOLDER") -> Rule:
    return Rule("a path", example, lambda text: _only(text.strip() and "\0" not in text, text), metavar)


def window() -> Rule:
    """LEFT,RIGHT: two whole numbers of at least -1, where -1 means no limit."""

    def convert(text):
        left, right = (whole(-1).convert(part.strip()) for part in text.strip("()").split(","))
        return left, right

    says = "LEFT,RIGHT, two whole numbers of at least 0 (or -1: without limit)"
    return Rule(says, "128,0", convert, "LEFT,RIGHT")


def shares() -> Rule:
    """TRAINING,VALIDATION,TEST: up to three numbers of at least 0, the first above 0; kept as text for Megatron."""

    def convert(text):
        # Only plain decimals, because Megatron finds the numbers by searching for digits and dots.
        parts = text.split(",")
        plain = len(parts) <= 3 and all(re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", part) for part in parts)
        return _only(plain and 0 < float(parts[0]) and all(float(part) < 1e9 for part in parts), text)

    says = "up to three shares TRAINING,VALIDATION,TEST, plain numbers of at least 0, the first above 0"
    return Rule(says, "90,10,0", convert, "A,B,C")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints a default once, and only if there is one."""

    def _get_help_string(self, action):
        named = "default:" in (action.help or "").lower()
        return action.help if named or action.nargs == 0 or action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line with a way out, printed once for all ranks, and exit status 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        # Otherwise argparse would treat -5,0 or -1e3 as unknown flags.
        self._negative_number_matcher = re.compile(r"-[.0-9]|-(inf|nan)", re.IGNORECASE)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {self._readable(message)}\n")

    def _readable(self, message):
        flag, text = re.fullmatch(r"(?:argument ([^\s:/]+)[^:]*: )?(.*)", message, re.DOTALL).groups()
        if flag and text.startswith("expected "):
            return f"{flag} needs a value; see {self.prog} --help."
        if flag and text.startswith("ignored explicit argument"):
            return f"{flag} takes no value ({text.rpartition(' ')[2]} is given); write {flag} alone, or leave it out."
        if text.startswith("unrecognized arguments: "):
            return self._unknown(text.partition(": ")[2].split()[0])
        return text

    def _unknown(self, word):
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1)
        way_out = f"use {near[0]}" if near and name.startswith("-") else f"see {self.prog} --help"
        what = "is not a flag of this trainer" if name.startswith("-") else "stands alone and belongs to no flag"
        return f"{word} {what}; {way_out}."

    def exit(self, status=0, message=None):
        if message and status:
            leave_with_one_line(message, status)
        super().exit(status, message if _rank() == 0 else None)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def leave_with_one_line(message: str, status: int) -> NoReturn:
    """Print one line and end this process with ``status``, before any process group exists.

    Rank 0 prints for all. Another rank first waits, so that torchrun ends it if rank 0 has exited; otherwise it prints
    that only this rank has the error.
    """
    line, rank = "\\n".join(message.rstrip("\n").splitlines()), _rank()
    if rank:
        time.sleep(GRACE)
        line = f"rank {rank}: {line}"
    leave(line, status)


def leave(line: str | None, status: int) -> NoReturn:
    """Print ``line``, if there is one, and end this process with ``status``."""
    if line:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    raise SystemExit(status)
