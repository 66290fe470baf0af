"""The table of docs/flags.md, generated from the settings' declarations.

``python -m mindspeed_cp.arguments.documentation docs/flags.md`` updates the file.
"""

import re
import sys
from pathlib import Path

from mindspeed_cp.arguments.declared import our_flags
from mindspeed_cp.settings.setting import Setting

HEAD = "| flag | default | choices | rule |\n|---|---|---|---|\n"
_TABLE = re.compile(re.escape(HEAD) + r"(?:\|[^\n]*\n)*")


def flag_table() -> str:
    """The table in Markdown, one row per flag."""
    return HEAD + "".join(map(_row, our_flags()))


def with_table(page: str) -> str:
    """``page`` with its table replaced by the current one."""
    return _TABLE.sub(lambda _: flag_table(), page, count=1)


def _row(each: Setting) -> str:
    also = f" (also {', '.join(f'`{flag}`' for flag in each.also)})" if each.also else ""
    number = f"{each.takes} >= {each.least}" if each.least is not None else each.takes
    choices = "switch" if each.switch else ", ".join(filter(None, (*each.choices, number)))
    cells = (f"`{each.flag}`{also}", each.default_said, choices, _rule(each))
    return f"| {' | '.join(cells)} |\n"


def _rule(each: Setting) -> str:
    meanings = "; ".join(f"{name}: {does}" for name, does in each.meanings_by_choice.items() if does)
    parts = [f"{each.help} ({meanings})" if meanings else each.help, each.rule]
    if each.taken_by:
        parts.append(f"ignored by {each.algorithms(False, ', ')}")
    text = ". ".join(part if _is_name(part.split()[0], each) else part[0].upper() + part[1:] for part in parts)
    marked = re.sub(r"(?<!`)--[\w-]+", lambda flag: f"`{flag.group()}`", text)
    return f"{marked}. See {each.see}" if each.see else marked


def _is_name(word: str, each: Setting) -> bool:
    return "_" in word or word in each.choices


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
