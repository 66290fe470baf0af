"""Conditions of patches: each says why a patch is not needed here, or "" where it is."""

import importlib
import importlib.util
from collections.abc import Callable

from mindspeed_cp.patches.rows import found_at, uninstalled

LEGACY = "megatron.legacy.model.transformer"


def present(target: str, why: str) -> Callable[[], str]:
    """``why`` where there is such a name."""
    return lambda: why if found_at(target) is not None else ""


def installed(package: str, why: str) -> Callable[[], str]:
    """``why`` where ``package`` can be found."""
    return lambda: "" if uninstalled(package, why)() else why


def without_checkout() -> str:
    """Why no checkout is patched: "" when megatron.training can be imported."""
    return _why_missing("megatron.training", "no Megatron-LM checkout (megatron.training) on the import path")


def without_legacy() -> str:
    """Why no legacy model is patched: "" when there are some."""
    return without_checkout() or _why_missing(LEGACY, "this Megatron-LM has no legacy models")


def _why_missing(module: str, missing: str) -> str:
    try:
        if importlib.util.find_spec(module) is None:
            return missing
        importlib.import_module(module)
    except ImportError as error:
        # The training script imports the same and shows the whole traceback.
        return f"{module} cannot be imported: {error}"
    return ""
