"""Who may know whom: only megatron/, patches/, prove/, the adaptor and the runner know Megatron, and nothing below them
knows patches/.
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BRIDGES = {"mindspeed_cp/megatron_adaptor.py", "mindspeed_cp/run.py"}
ROOMS = ("mindspeed_cp/megatron/", "mindspeed_cp/prove/")
BELOW = [
    path
    for folder in ("mindspeed_cp", "arguments")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if str(path.relative_to(REPOSITORY)) not in BRIDGES
    and not str(path.relative_to(REPOSITORY)).startswith(ROOMS)
]
PATCHES = sorted((REPOSITORY / "patches").glob("*.py"))


def imported(source):
    """Dotted names of the modules that ``source`` imports, at any depth, import_module("...") included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)


def within(name, package):
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize("path", BELOW, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_below_the_bridge_knows_megatron_or_the_patches(path):
    names = set(imported(path.read_text()))
    known = {name for name in names if within(name, "megatron") or within(name, "mindspeed_cp.patches")}
    assert known == set()


def test_no_patch_depends_on_the_adaptor_that_applies_it():
    for path in PATCHES:
        assert not {name for name in imported(path.read_text()) if within(name, "mindspeed_cp.megatron_adaptor")}, path


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import megatron.core\nfrom megatron import core\ndef f():\n    from mindspeed_cp import patches\n"
        "    importlib.import_module('megatron.training')\n"
    )
    assert set(imported(source)) == {"megatron.core", "mindspeed_cp.patches", "megatron.training"}


def test_every_warning_takes_the_one_road():
    found = {
        path.name
        for path in (*BELOW, *PATCHES, *(REPOSITORY / name for name in BRIDGES))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")
    }
    assert found == {"notices.py"}
