"""MindSpeed's import paths, answered by this package while no real MindSpeed is installed.

``install`` adds one finder at the end of ``sys.meta_path``, so a real package always wins; ``uninstall`` removes it and
every module that came through it. A leaf name is the module of this package itself; a name with others below it is a
package that exports what its own module does.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

_CP = "mindspeed.core.context_parallel"

# MindSpeed's module -> ours; the packages above them come of themselves.
ALIASES = {
    "mindspeed.megatron_adaptor": "mindspeed_cp.megatron_adaptor",
    f"{_CP}.ulysses_context_parallel": "mindspeed_cp.algorithms.ulysses_attention",
    f"{_CP}.ulysses_context_parallel.ulysses_context_parallel": "mindspeed_cp.algorithms.ulysses_attention",
    f"{_CP}.ulysses_context_parallel.unaligned_cp.mapping": "mindspeed_cp.comm.mapping",
    f"{_CP}.ring_context_parallel": "mindspeed_cp.compat.ring",
    f"{_CP}.ring_context_parallel.ring_context_parallel": "mindspeed_cp.compat.ring",
    f"{_CP}.model_parallel_utils": "mindspeed_cp.compat.process_groups",
}


def _packages():
    """Every name that has an alias below it."""
    names = [name.split(".") for name in ALIASES]
    return {".".join(parts[:count]) for parts in names for count in range(1, len(parts))}


class MindSpeedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the alias modules, and remembers them."""

    def __init__(self):
        self._packages, self.made = _packages(), {}

    def find_spec(self, name, path=None, target=None):
        if name not in ALIASES and name not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name in self._packages)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        if name in ALIASES:
            real = importlib.import_module(ALIASES[name])
            if name in self._packages:
                module.__dict__.update({attribute: getattr(real, attribute) for attribute in real.__all__})
            else:
                # The import system takes what it finds here; the real module keeps its own name and spec.
                sys.modules[name] = real
        else:
            module.__doc__ = "A MindSpeed import path that mindspeed_cp answers; see mindspeed_cp.compat."
        self.made[name] = sys.modules[name]


def _installed():
    return next((finder for finder in sys.meta_path if isinstance(finder, MindSpeedFinder)), None)


def install():
    """Answer MindSpeed's import paths; does nothing where a real MindSpeed is importable or it is done already.

    Returns:
        Why nothing was done, "" when the paths are answered now.
    """
    if _installed() is not None:
        return "the paths are answered already"
    if "mindspeed" in sys.modules or importlib.util.find_spec("mindspeed") is not None:
        return "a mindspeed package is installed"
    sys.meta_path.append(MindSpeedFinder())
    return ""


def uninstall():
    """Take ``install`` back: the finder and every alias go, our own modules stay. A second call does nothing."""
    finder = _installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for name, module in finder.made.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
