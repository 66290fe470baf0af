"""Keep torch.compile out of this package: it would trace into exchanges and recompile for every batch."""

from collections.abc import Callable
from typing import Any

import torch


def outside_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a graph break for torch.compile.

    If the CPU stand-in has made torch.compile a no-op, ``function`` is returned as it is, because importing the
    compiler would take seconds.
    """
    return function if getattr(torch.compile, "compiles_nothing", False) else torch.compiler.disable(function)
