"""Modules made from source text, for tests of patches."""

import sys
from types import ModuleType


def module_from(name, source, monkeypatch):
    """The module ``name``, in sys.modules until the test ends."""
    module = ModuleType(name)
    module.__file__ = f"/somewhere/{name}.py"
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module
