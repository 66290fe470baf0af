"""Whether there is a Megatron-LM checkout, which contains megatron.training and megatron.legacy."""

import importlib
import importlib.util

LEGACY = "megatron.legacy.model.transformer"


def without_checkout() -> str:
    """Why no checkout is patched; "" if megatron.training can be imported."""
    return _why_missing("megatron.training", "no Megatron-LM checkout (megatron.training) on the import path")


def without_legacy() -> str:
    """Why no legacy models are patched; "" if they can be imported."""
    return without_checkout() or _why_missing(LEGACY, "this Megatron-LM has no legacy models")


def _why_missing(module: str, missing: str) -> str:
    try:
        if importlib.util.find_spec(module) is None:
            return missing
        importlib.import_module(module)
    except ImportError as error:
        # The training script imports the same module and shows the whole traceback.
        return f"{module} cannot be imported: {error}"
    return ""
