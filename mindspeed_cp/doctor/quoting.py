"""Splits a command line into words as bash does: single and double quotes, backslashes, and $'...'."""

import re

_SIMPLE = {
    "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\",
    "'": "'", '"': '"', "?": "?",
}  # fmt: skip
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|([0-7]{1,3})|c(.)|(.))", re.S)
_PIECE = re.compile(
    r"""(?P<space>\s+)
    | \$'(?P<escaped>(?:[^'\\]|\\.)*)'
    | '(?P<literal>[^']*)'
    | \$?"(?P<double>(?:[^"\\]|\\.)*)"
    | \\(?P<next>.)
    | (?P<letter>\$(?!['"])|[^\s'"\\$])""",
    re.S | re.X,
)


def words(command: str) -> list[str]:
    """The words of a command; variables and operators are not interpreted.

    Raises:
        ValueError: a quote is not closed.
    """
    found: list[str] = []
    word: str | None = None
    place = 0
    while place < len(command):
        match = _PIECE.match(command, place)
        if match is None:
            raise ValueError("nothing follows a backslash" if command[place] == "\\" else "no closing quotation")
        if match["space"] is None:
            word = (word or "") + _text(match)
        elif word is not None:
            found.append(word)
            word = None
        place = match.end()
    return found if word is None else [*found, word]


def _text(match: re.Match[str]) -> str:
    """The text of one quoted piece or one character."""
    kind, text = str(match.lastgroup), match[str(match.lastgroup)]
    if kind == "escaped":
        return _ESCAPE.sub(_escape, text)
    if kind == "double":  # a backslash escapes only $, `, ", itself and the end of a line
        return re.sub(r"\\(?:\n|([$`\"\\]))", r"\1", text)
    return "" if kind == "next" and text == "\n" else text


def _escape(match: re.Match[str]) -> str:
    byte, short, long, octal, control, letter = match.groups()
    if byte or short or long:
        return chr(int(byte or short or long, 16))
    if octal:
        return chr(int(octal, 8) & 0xFF)
    if control:
        return chr(ord(control) & 0x1F)
    return _SIMPLE.get(letter, "\\" + letter)
