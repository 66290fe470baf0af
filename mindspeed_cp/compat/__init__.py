"""MindSpeed's import paths, provided by this package while no real MindSpeed is installed.

``install`` adds one finder at the end of ``sys.meta_path``, so a real package always wins; ``uninstall`` removes it and
every module that it made. A provided path exports what this project's module exports; names that only MindSpeed has
raise an ImportError that says so.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_CP = "mindspeed.core.context_parallel"
_ADAPTOR = "mindspeed.megatron_adaptor"

# MindSpeed's module -> ours; parent packages are created automatically.
ALIASES = {
    _ADAPTOR: "mindspeed_cp.megatron_adaptor",
    "mindspeed.core.parallel_state": "mindspeed_cp.compat.process_groups",
    "mindspeed.arguments": "mindspeed_cp.compat.arguments",
    "mindspeed.patch_utils": "mindspeed_cp.compat.patch_manager",
    "mindspeed.utils": "mindspeed_cp.compat.handed",
    "mindspeed.core.ssm.gated_delta_net": "mindspeed_cp.compat.delta_net",
    f"{_CP}.get_batch_utils": "mindspeed_cp.compat.handed",
    f"{_CP}.utils": "mindspeed_cp.compat.tensors",
    f"{_CP}.ulysses_context_parallel": "mindspeed_cp.compat.ulysses",
    f"{_CP}.ulysses_context_parallel.ulysses_context_parallel": "mindspeed_cp.compat.ulysses",
    f"{_CP}.ulysses_context_parallel.unaligned_cp.mapping": "mindspeed_cp.compat.mapping",
    f"{_CP}.unaligned_cp.mapping": "mindspeed_cp.compat.mapping",
    f"{_CP}.mapping": "mindspeed_cp.compat.mapping",
    f"{_CP}.ring_context_parallel": "mindspeed_cp.compat.ring",
    f"{_CP}.ring_context_parallel.ring_context_parallel": "mindspeed_cp.compat.ring",
    f"{_CP}.ring_context_parallel.context_parallel_kv_cache": "mindspeed_cp.compat.kv_cache",
    f"{_CP}.context_parallel_kv_cache": "mindspeed_cp.compat.kv_cache",
    f"{_CP}.model_parallel_utils": "mindspeed_cp.compat.process_groups",
}

# Name that MindSpeed has under a provided path -> what to use here instead.
INSTEAD = {
    "get_batch_on_this_cp_rank": "megatron.core.utils.get_batch_on_this_cp_rank, which the adaptor patches",
    "rotary_pos_embedding_utils": "get_pos_emb_on_this_cp_rank of Megatron's rope_utils, which the adaptor patches",
    "adaptive_context_parallel": "--context-parallel-algo megatron_cp_algo --cp-kv-exchange direct",
    "dot_product_attention": "Megatron's own DotProductAttention, which the adaptor patches",
    "ContextParallelKVCache": "kv_cache_policy of ContextParallelConfig (--context-parallel-kv-cache-policy)",
    "get_ring_degree": "mindspeed_cp.megatron_adaptor.state().config.ring_size",
    "AttentionWithCp": "mindspeed_cp.context_parallel_attention",
}


def _packages() -> set[str]:
    """The names of all parent packages of the aliases."""
    names = [name.split(".") for name in ALIASES]
    return {".".join(parts[:count]) for parts in names for count in range(1, len(parts))}


class MindSpeedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, creates and remembers the alias modules."""

    def __init__(self) -> None:
        self._packages = _packages()
        self.made: dict[str, ModuleType] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in ALIASES or name in self._packages:
            # Every path is a package, so that ``from path import name`` calls this finder for names that it lacks.
            return ModuleSpec(name, self, is_package=True)
        parent, _, missing = name.rpartition(".")
        if parent in ALIASES or parent == _CP:
            raise ModuleNotFoundError(self._explain(parent, missing))  # with name= it would be swallowed
        return None

    def _explain(self, parent: str, missing: str) -> str:
        below = sorted({name[len(parent) + 1 :].partition(".")[0] for name in ALIASES if name.startswith(f"{parent}.")})
        here = [*(importlib.import_module(ALIASES[parent]).__all__ if parent in ALIASES else ()), *below]
        instead = f"use {INSTEAD[missing]}" if missing in INSTEAD else "leave it out"
        return (
            f"no {missing!r} in {parent}: mindspeed_cp answers this MindSpeed path with {', '.join(here)}; {instead}, "
            "or see docs/migration-from-mindspeed.md."
        )

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__doc__ = "A MindSpeed import path that mindspeed_cp answers; see mindspeed_cp.compat."
        real = importlib.import_module(ALIASES[name]) if name in ALIASES else None
        if name == _ADAPTOR:
            # The module has state, so the alias must be the same object; the import system uses what is in sys.modules.
            assert real is not None
            sys.modules[name] = real
        elif real is not None:
            exported = {attribute: getattr(real, attribute) for attribute in real.__all__}
            module.__dict__.update(exported, __all__=real.__all__)
        self.made[name] = sys.modules[name]


def _installed() -> MindSpeedFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, MindSpeedFinder)), None)


def is_installed() -> bool:
    """Whether this package provides MindSpeed's paths, because no real MindSpeed is installed."""
    return _installed() is not None


def install() -> str:
    """Provide MindSpeed's import paths; does nothing if a real MindSpeed is importable or they are provided already.

    Returns:
        Why nothing was done, "" if the paths were installed.
    """
    if _installed() is not None:
        return "the paths already resolve to mindspeed_cp"
    if "mindspeed" in sys.modules or importlib.util.find_spec("mindspeed") is not None:
        return "a mindspeed package is installed"
    sys.meta_path.append(MindSpeedFinder())
    return ""


def uninstall() -> None:
    """Undo ``install``: remove the finder and every alias, but keep our own modules. A second call does nothing."""
    finder = _installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for name, module in finder.made.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
