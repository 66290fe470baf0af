"""Who may know whom: which rooms know Megatron and the patches, and that no files import each other in a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BRIDGES = ("mindspeed_cp/megatron_adaptor.py", "mindspeed_cp/run.py", "mindspeed_cp/prove/")
FOLDERS = ("mindspeed_cp", "arguments", "patches")
FILES = {
    str(path.relative_to(REPOSITORY)): path
    for folder in FOLDERS
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}
BELOW = [name for name in FILES if not name.startswith((*BRIDGES, "patches/"))]


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


@pytest.mark.parametrize("name", BELOW)
def test_nothing_below_the_bridge_knows_megatron_or_the_patches(name):
    names = set(imported(FILES[name].read_text()))
    refused = (
        ["mindspeed_cp.patches"] if name.startswith("mindspeed_cp/megatron/") else ["mindspeed_cp.patches", "megatron"]
    )
    assert {one for one in names if any(within(one, package) for package in refused)} == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("patches/")])
def test_no_patch_depends_on_the_adaptor_that_applies_it(name):
    assert not {one for one in imported(FILES[name].read_text()) if within(one, "mindspeed_cp.megatron_adaptor")}


@cache
def graph():
    """Module -> modules of this project that its file imports; a part of a package is not the package."""
    modules = {}
    for name in FILES:
        parts = [*([] if name.startswith("mindspeed_cp/") else ["mindspeed_cp"]), *name.removesuffix(".py").split("/")]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = FILES[name]

    def module_of(name):
        while name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {module_of(name) for name in imported(path.read_text()) if within(name, "mindspeed_cp")} - {module}
        for module, path in modules.items()
    }


def circles(edges):
    """Sets of modules each of which comes to each other by imports."""
    reached = {}
    for start in edges:
        found, waiting = set(), [start]
        while waiting:
            new = edges[waiting.pop()] - found
            found |= new
            waiting += new
        reached[start] = found
    return {frozenset(two for two in reached[one] if one in reached[two]) for one in edges if one in reached[one]}


def test_no_files_import_each_other_in_a_circle():
    assert [" <-> ".join(sorted(circle)) for circle in circles(graph())] == []


def test_a_circle_is_found_whatever_the_import_and_however_long():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}, "g": {"a"}}
    assert circles(edges) == {frozenset("abc"), frozenset("ef")}
    assert graph()["mindspeed_cp"] and all(edges.keys() >= targets for targets in edges.values())
    assert "mindspeed_cp.patches.manager" in graph()["mindspeed_cp.megatron_adaptor"]  # imported inside a function


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import megatron.core\nfrom megatron import core\ndef f():\n    from mindspeed_cp import patches\n"
        "    importlib.import_module('megatron.training')\n"
    )
    assert set(imported(source)) == {"megatron.core", "mindspeed_cp.patches", "megatron.training"}


def test_all_warnings_go_through_notices():
    found = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")
    }
    assert found == {"mindspeed_cp/settings/notices.py"}
