"""Splits a command line into words as bash does: single and double quotes, backslashes, and $'...'."""

import re

_SIMPLE = {
    "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\",
    "'": "'", '"': '"', "?": "?",
}  # fmt: skip
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|([0-7]{1,3})|c(.)|(.))", re.S)


def words(command: str) -> list[str]:
    """The words of a command; variables and operators are not interpreted.

    Raises:
        ValueError: a quote is not closed.
    """
    found: list[str] = []
    word: str | None = None
    place = 0
    while place < len(command):
        letter = command[place]
        if letter.isspace():
            if word is not None:
                found.append(word)
            word, place = None, place + 1
            continue
        text, place = _piece(command, place)
        word = (word or "") + text
    return found if word is None else [*found, word]


def _piece(command: str, place: int) -> tuple[str, int]:
    """(the text of one quoted piece or one character, the index after it)."""
    letter = command[place]
    if command.startswith("$'", place):
        return _ansi(command, place + 2)
    if letter == "'":
        end = command.find("'", place + 1)
        if end < 0:
            raise ValueError("no closing quotation")
        return command[place + 1 : end], end + 1
    if letter == '"' or command.startswith('$"', place):
        return _double(command, place + (1 if letter == '"' else 2))
    if letter == "\\":
        if place + 1 == len(command):
            raise ValueError("nothing follows a backslash")
        return command[place + 1].replace("\n", ""), place + 2
    return letter, place + 1


def _double(command: str, place: int) -> tuple[str, int]:
    """Within double quotes, a backslash escapes only $, `, ", itself and the end of a line."""
    text = ""
    while place < len(command) and command[place] != '"':
        if command[place] == "\\" and command[place + 1 : place + 2] in ("$", "`", '"', "\\", "\n"):
            place += 1
            text += command[place].replace("\n", "")
        else:
            text += command[place]
        place += 1
    if place >= len(command):
        raise ValueError("no closing quotation")
    return text, place + 1


def _ansi(command: str, place: int) -> tuple[str, int]:
    match = re.compile(r"((?:[^'\\]|\\.)*)'", re.S).match(command, place)
    if not match:
        raise ValueError("no closing quotation")
    return _ESCAPE.sub(_escape, match[1]), match.end()


def _escape(match: re.Match[str]) -> str:
    byte, short, long, octal, control, letter = match.groups()
    if byte or short or long:
        return chr(int(byte or short or long, 16))
    if octal:
        return chr(int(octal, 8) & 0xFF)
    if control:
        return chr(ord(control) & 0x1F)
    return _SIMPLE.get(letter, "\\" + letter)
