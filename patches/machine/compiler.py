"""torch.compile stays outside of this package: it would trace into exchanges, and compile again for every batch."""

from collections.abc import Callable
from typing import Any

import torch


def outside_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, at which torch.compile breaks its graph.

    Where the stand-in for CUDA has made torch.compile do nothing there is nothing to keep out, and importing the
    compiler for that would take seconds.
    """
    return function if getattr(torch.compile, "compiles_nothing", False) else torch.compiler.disable(function)
