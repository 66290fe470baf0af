"""Packages that MindSpeed imports and that nothing here computes with: their names exist, and calls do nothing."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

# Compilers for NPUs, with which MindSpeed decorates its kernels; CANN's Python, which is asked for the device's name.
PACKAGES = ("acl", "scipy", "torchair", "triton")
SOC = "Ascend910B1"


class _Unneeded(types.ModuleType):
    """A module of which every name can be imported; what its decorators make raises when it is called."""

    __path__ = ()
    __version__ = "3.5.0"  # Megatron compares Triton's

    def __getattr__(self, name):
        if name.startswith("__") or name == "active":  # Triton's driver: there is no device for it
            raise AttributeError(name)
        return (lambda: SOC) if name == "get_soc_name" else _Name(f"{self.__name__}.{name}")


class _Name:
    """A decorator, with or without arguments, an annotation, or a base for further names."""

    def __init__(self, name):
        self._name = name

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(f"{self._name}.{name}")

    def __getitem__(self, key):
        raise NotImplementedError(f"the test bed has no {self._name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Unneeded(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Answer the imports of PACKAGES from now on; torch has looked for its compiler before, and found none."""
    importlib.import_module("torch_npu.contrib.transfer_to_npu")  # it brings torch's inductor
    importlib.import_module("torch.utils._triton").has_triton_package()  # which remembers the answer
    sys.modules.pop("torchair", None)  # torch_npu's own, which asks for CANN's libraries
    sys.meta_path.insert(0, _Finder())
