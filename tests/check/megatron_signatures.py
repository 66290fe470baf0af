"""What the patched names of Megatron look like in each tried version, and how another version differs.

    python tests/check megatron_signatures FOLDER          differences of a Megatron from the newest tried version
    python tests/check megatron_signatures --add FOLDER    writes its version into the table, once it is tried

FOLDER holds megatron/core: a checkout, a folder of pip install --target, site-packages. Megatron is read, not imported,
so that one that cannot be imported is shown too. The table, tests/helpers/megatron_signatures.json, has for each
patched name the reason of its patch and, from the version on in which it changed, the parameters.
"""

import argparse
import ast
import json
import re
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/helpers/megatron_signatures.json"
ABSENT = "is not there"


def version_of(folder: Path) -> str:
    """major.minor.patch of the Megatron in ``folder``."""
    text = (folder / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", text, re.M))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH"))


def in_order(version: str) -> list[int]:
    """Key by which versions are sorted."""
    return [int(part) for part in version.split(".")]


def signature(folder: Path, target: str) -> str:
    """The parameters of a function or method; "module", "class", "a value", "inherited from", "imported from"; ABSENT.

    Names and defaults alone: an annotation that changes changes no call.
    """
    parts = target.split(".")
    for used in range(len(parts), 0, -1):
        path = folder.joinpath(*parts[:used])
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
        if file is not None:
            return _describe(folder, _parsed(file).body, parts[used:]) if parts[used:] else "module"
    return ABSENT


@lru_cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _describe(folder, body, names) -> str:
    found, (name, *rest) = ABSENT, names
    for node in _statements(body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = _describe(folder, node.body, rest) if rest else "class"
            if found == ABSENT and node.bases:
                found = f"inherited from {', '.join(map(ast.unparse, node.bases))}"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            found = _parameters(node.args)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    found = _imported(folder, node.module, ".".join([alias.name, *rest]))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(one, ast.Name) and one.id == name for one in targets):
                found = "a value"
    return found


def _imported(folder, module, name) -> str:
    inside = module is not None and module.startswith("megatron.")
    return signature(folder, f"{module}.{name}") if inside else f"imported from {module}"


def _statements(body):
    """Statements of a module or class, those within if and try too."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            handlers = [node for handler in getattr(node, "handlers", ()) for node in handler.body]
            # What is defined last stands: the branch where an optional library is there.
            yield from _statements([*handlers, *node.orelse, *node.body])


def _parameters(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def read_table():
    """target -> {"reason": of its patch, "signatures": {version: from which on it has them}}."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}


def versions_in(table) -> list[str]:
    """The versions that were tried, oldest first."""
    return table["versions"]


def known(table, target: str, version: str) -> str:
    """The signature that the table has for this version."""
    changes = table["patches"][target]["signatures"]
    before = [one for one in changes if in_order(one) <= in_order(version)]
    return changes[max(before, key=in_order)] if before else ABSENT


def differences(folder: Path, table) -> list[str]:
    """What differs from the newest tried version: the patched name, its patch's reason, both signatures."""
    newest, version = versions_in(table)[-1], version_of(folder)
    lines = []
    for target, row in table["patches"].items():
        old, new = known(table, target, newest), signature(folder, target)
        if old != new:
            marked = [f"  {newest:8}{old}", f"  {version:8}{new}"]
            lines += [target, f"  patched because {row['reason']}", *marked]
    return lines


def add(folder: Path) -> None:
    """Write the signatures of this Megatron into the table, with the rows that the adaptor has now."""
    from mindspeed_cp import megatron_adaptor

    table, version = read_table() or {"versions": [], "patches": {}}, version_of(folder)
    versions = sorted({*versions_in(table), version}, key=in_order)
    patches = {}
    for row in megatron_adaptor.report():
        if not row.target.startswith("megatron."):
            continue
        tried = versions_in(table) if row.target in table["patches"] else []
        seen = {one: known(table, row.target, one) for one in tried} | {version: signature(folder, row.target)}
        order = sorted(seen, key=in_order)
        changes = {one: seen[one] for at, one in enumerate(order) if at == 0 or seen[one] != seen[order[at - 1]]}
        if all(found == ABSENT for found in changes.values()):  # added, not replaced
            continue
        patches[row.target] = {"reason": row.reason, "signatures": changes}
    table = {"versions": versions, "patches": dict(sorted(patches.items()))}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="folder that holds megatron/core")
    parser.add_argument("--add", action="store_true", help="write this version into the table")
    options = parser.parse_args(argv)
    for folder in options.folder:
        if not (folder / "megatron" / "core" / "package_info.py").is_file():
            parser.error(f"{folder} holds no megatron/core; name a checkout or a folder of pip install --target.")
        if options.add:
            add(folder)
            continue
        table = read_table()
        lines = differences(folder, table)
        newest, count = versions_in(table)[-1], sum(not line.startswith(" ") for line in lines)
        print(f"{count} of {len(table['patches'])} patched names differ from {newest} in {version_of(folder)}")
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
