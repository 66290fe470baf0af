"""Sequence lengths in the notations 131072, 128k, 1m."""

import re

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def tokens(text: str) -> int:
    """Parse a number of tokens; k is 1,024 and m 1,048,576.

    Raises:
        ValueError: ``text`` is not such a number. The message names value and rule; argparse adds the flag.
    """
    match = re.fullmatch(r"0*([1-9][0-9]*)([km]?)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a length; write a number of tokens above 0, such as 4096, 128k or 1m.")
    return int(match[1]) * UNITS[match[2]]
