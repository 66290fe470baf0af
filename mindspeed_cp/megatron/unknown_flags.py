"""What a script's own parser says about a command line: python -m mindspeed_cp.megatron.unknown_flags SCRIPT FLAGS...

This separate process only parses: with the embedded trainer's parser, or Megatron-LM's, including MindSpeed's flags if
the script imports MindSpeed. Prints a JSON object, or null if there is no such parser.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from mindspeed_cp.megatron.neighbour import FEATURES, FRONTS, front_named_in, packages_named_in

ARGUMENTS = "megatron.training.arguments"
TITLES = {"mindspeed": "MindSpeed", "mindspeed_llm": "MindSpeed-LLM"}


def parser_of(script: Path) -> tuple[argparse.ArgumentParser, dict[str, str]] | None:
    """(the parser that the script uses, flag -> the project that adds it); None if the parser is not known.

    Raises:
        ImportError: the script imports MindSpeed, which cannot be imported here.
    """
    home = script.resolve().parent
    if (home / "trainer" / "arguments.py").is_file():
        sys.path[:0] = [str(home), str(home.parent)]
        own: argparse.ArgumentParser = importlib.import_module("trainer.arguments").build_parser()
        return own, {}
    sys.path.insert(0, str(home))
    package = front_named_in(str(script))
    if not (package or script.name.startswith("pretrain_")) or not _is_there(ARGUMENTS):
        return None
    owners = _flags_of_features(package) if package else {}
    importlib.import_module("mindspeed_cp.megatron_adaptor")
    bare = argparse.ArgumentParser(prog=script.name, allow_abbrev=False)
    of_megatron: argparse.ArgumentParser = importlib.import_module(ARGUMENTS).add_megatron_arguments(bare)
    if package:
        sys.modules[FEATURES].MindSpeedFeaturesManager.register_features_args(of_megatron)
    return of_megatron, owners


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _flags_of_features(package: str) -> dict[str, str]:
    """Flag -> the project whose feature adds it; imports the features of ``package`` without patching anything."""
    os.environ["TRAINING_BACKEND"] = "flags"  # with an unknown backend MindSpeed-LLM's import patches nothing
    with _without_device():
        importlib.import_module(f"{package}.features_manager")
    owners: dict[str, str] = {}
    known = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for feature in sys.modules[FEATURES].MindSpeedFeaturesManager.FEATURES_LIST:
        before = set(known._option_string_actions)
        feature.register_args(known)
        title = TITLES.get(type(feature).__module__.partition(".")[0], package)
        owners |= dict.fromkeys(known._option_string_actions.keys() - before, title)
    return owners


class _NoDevice(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A dummy torch_npu if it is not installed, since MindSpeed's features import it but their flags do not need it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torch_npu" else None

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _without_device() -> Iterator[None]:
    finder = _NoDevice()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if getattr(module, "__loader__", None) is finder]:
            del sys.modules[name]


def asked(script: Path, flags: list[str]) -> dict[str, Any] | None:
    """The parser's findings; None if there is no known parser.

    Returns:
        unknown: flags that it does not know. refused: its message if it ends the program. owners: project -> those of
        the flags that it adds. added: flags that the script itself adds to the parser -> the file that does.
    """
    found = parser_of(script)
    if found is None:
        return None
    parser, owner = found
    given = [token.partition("=")[0] for token in flags if token.startswith("--")]
    owners: dict[str, list[str]] = {}
    for flag in dict.fromkeys(given):
        if flag in owner:
            owners.setdefault(owner[flag], []).append(flag)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, rest = parser.parse_known_args(flags)
    except (SystemExit, ValueError) as error:
        line = (said.getvalue().strip() or str(error)).splitlines()[-1]
        return {"unknown": [], "refused": line.rpartition("error: ")[2], "owners": owners, "added": {}}
    unknown = dict.fromkeys(token.partition("=")[0] for token in rest if token.startswith("--"))
    added = added_by(script, unknown) if unknown else {}
    return {"unknown": [flag for flag in unknown if flag not in added], "refused": "", "owners": owners, "added": added}


def added_by(script: Path, flags: Iterable[str]) -> dict[str, str]:
    """Flag -> the first file that writes it in quotes, of the script and the packages beside it that it imports.

    Such a script hands Megatron a function that adds them (extra_args_provider), which nobody can call without running
    the script. MindSpeed's features were asked for all of theirs.
    """
    home, packages = script.resolve().parent, sorted({*packages_named_in(str(script))} - FRONTS.keys())
    sources = [script.resolve(), *(path for name in packages for path in sorted((home / name).rglob("*.py")))]
    found: dict[str, str] = {}
    for path in sources:
        written = set(re.findall(r"""["'](--[\w-]+)["']""", path.read_text(errors="replace")))
        for flag in written.intersection(flags) - found.keys():
            found[flag] = str(path.relative_to(home))
    return found


def main() -> int:
    os.environ["MINDSPEED_CP_DEVICE"] = "cpu"  # parsing needs no device
    with contextlib.redirect_stdout(sys.stderr):
        found = asked(Path(sys.argv[1]), sys.argv[2:])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
