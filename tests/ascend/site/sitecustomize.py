"""Every Python of the test bed comes here at its start: torch_npu computes on the CPU as soon as it is imported.

``bed.environment()`` puts this folder on PYTHONPATH, so that unchanged programs (torchrun, Megatron-LM's
pretrain_gpt.py, the launch scripts, spawned processes) find "npu" devices. Nothing is imported before the program asks
for torch.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]


class _AfterTorchNpu(importlib.abc.MetaPathFinder):
    """Finds torch_npu as everybody else does, and installs the CPU's operators when its import is done."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        sys.path[:0] = added = [str(TESTS / "helpers"), str(TESTS / "ascend")]
        try:
            import npu_on_cpu

            npu_on_cpu.install_with_attention()
            npu_on_cpu.take_cann_9(module)
        finally:
            for folder in added:
                sys.path.remove(folder)


sys.meta_path.insert(0, _AfterTorchNpu())
