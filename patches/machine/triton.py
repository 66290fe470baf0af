"""Megatron's modules that import Triton even if it is not installed.

From 0.18 on ``import megatron.core`` fails without Triton, because of kernels for mixtures of experts that only CUDA
graphs use. Only that module gets a fake Triton: if every module could import it, torch would believe that Triton is
installed.
"""

import builtins
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NoReturn

from mindspeed_cp.patches.rows import installed, replacement

# The first of these modules that exists is used: 0.18, and 0.19, where kernels have a separate module.
KERNELS = (
    "megatron.core.transformer.moe.ops.paged_stash",
    "megatron.core.transformer.moe.paged_stash",
)


def _kernels() -> str:
    """The name of the module with the kernels, found by its file, since find_spec would import megatron.core."""
    spec = importlib.util.find_spec("megatron")
    # Several versions may be on the path; the first one that has the package is imported.
    folders = [
        Path(folder) for folder in (spec and spec.submodule_search_locations) or () if Path(folder, "core").is_dir()
    ]
    for name in KERNELS if folders else ():
        if folders[0].joinpath(*name.split(".")[1:]).with_suffix(".py").is_file():
            return name
    return ""


def nothing_is_asked() -> str:
    name = _kernels()
    return "" if name and name not in sys.modules else "this version does not import Triton by itself"


@replacement(
    "sys.meta_path",
    reason="from 0.18 on megatron.core cannot be imported without Triton, whose kernels for experts it uses with CUDA "
    "graphs alone",
    when=(installed("triton", "Triton is installed"), nothing_is_asked),
)
def without_triton(adaptor: Any, original: Any) -> list[Any]:
    return [WithoutTriton(_kernels()), *original]


class WithoutTriton(MetaPathFinder):
    """Finds one module and gives it a fake Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # Only for imports of this module itself, not for those of modules that it imports.
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    return _Triton() if name.partition(".")[0] == "triton" else builtins.__import__(name, *args, **kwargs)


class _Triton:
    """Has every attribute, such as language and constexpr; calling a function decorated by ``jit`` raises an error."""

    def __getattr__(self, name: str) -> "_Triton":
        return self

    def jit(self, function: Any) -> "_Kernel":
        return _Kernel(function.__name__)


class _Kernel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: Any) -> NoReturn:
        raise ValueError(
            f"Megatron's kernel {self._name} needs Triton, which is not installed; install it, or leave out the option "
            "that stashes the activations of experts in pages."
        )
