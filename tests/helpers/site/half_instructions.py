"""Emulate a processor without instructions for half precision: pytest --without-half-instructions.

torch's queries of the processor return False in every process that the tests start, and oneDNN is restricted to AVX2 by
its own variable. This module does not import torch; an import hook replaces the queries.
"""

import importlib.util
import os
import sys

VARIABLE = "TEST_WITHOUT_HALF_INSTRUCTIONS"
QUERIES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")


def ask():
    """Disable these instructions in this process and in all processes that it starts."""
    os.environ[VARIABLE] = "1"
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    deny_if_asked()


def deny_if_asked():
    if os.environ.get(VARIABLE) != "1":
        return
    if "torch.cpu" in sys.modules:
        _deny(sys.modules["torch.cpu"])
    else:
        sys.meta_path.insert(0, _Finder())


def _deny(module):
    for name in QUERIES:
        setattr(module, name, lambda: False)


class _Finder:
    """Modifies torch.cpu when it is loaded by its usual loader."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _deny(module)

        spec.loader.exec_module = exec_module
        return spec
