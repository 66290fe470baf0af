"""Flags that a script's parser does not know: python -m mindspeed_cp.megatron.unknown_flags SCRIPT FLAGS...

The script's own parser is asked in a process of its own, which parses and starts nothing: the embedded trainer's, or
that of the Megatron-LM checkout that the script belongs to. Prints a JSON list; null where there is no such parser.
"""

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path


def parser_of(script: Path) -> argparse.ArgumentParser | None:
    """The parser that will run, or None where this project does not know how to ask for it."""
    home = script.resolve().parent
    if (home / "trainer" / "arguments.py").is_file():
        sys.path[:0] = [str(home), str(home.parent)]
        own: argparse.ArgumentParser = importlib.import_module("trainer.arguments").build_parser()
        return own
    if script.name.startswith("pretrain_") and (home / "megatron" / "training" / "arguments.py").is_file():
        sys.path.insert(0, str(home))
        importlib.import_module("mindspeed_cp.megatron_adaptor")
        arguments = importlib.import_module("megatron.training.arguments")
        of_megatron: argparse.ArgumentParser = arguments.add_megatron_arguments(
            argparse.ArgumentParser(allow_abbrev=False)
        )
        return of_megatron
    return None


def unknown(script: Path, flags: list[str]) -> list[str] | None:
    """What of the flags nobody knows, values left out; None where the parser is not known or ends the program."""
    parser = parser_of(script)
    if parser is None:
        return None
    try:
        _, rest = parser.parse_known_args(flags)
    except (SystemExit, ValueError):
        return None  # the value of a flag is wrong: others say so
    return [token.partition("=")[0] for token in rest if token.startswith("--")]


def main() -> int:
    with contextlib.redirect_stdout(sys.stderr):
        found = unknown(Path(sys.argv[1]), sys.argv[2:])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
