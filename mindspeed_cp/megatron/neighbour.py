"""MindSpeed together with this project: MindSpeed patches first, and only context parallelism is done here.

MindSpeed applies its features according to its settings. With a context-parallel size of 1 it registers everything
except its context parallelism, so it is shown that size. This project's patches are undone before MindSpeed changes
anything, and applied again on top of its patches. All ways in which MindSpeed patches (its import, MindSpeed-LLM's
import, ``repatch``) use the same four methods of its features manager.
"""

import importlib
import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.notices import warn_rank0

VARIABLE = "MINDSPEED_CP"
FEATURES = "mindspeed.features_manager.features_manager"
DEFAULT_ALGORITHM = "megatron_cp_algo"  # of MindSpeed's --context-parallel-algo
SIZE = "context_parallel_size"


class Branch(NamedTuple):
    """A branch of MindSpeed that was tried; each belongs to one Megatron.

    Args:
        megatron: (major, minor) of megatron-core.
        name: name of the branch.
        tried: the newest commit that was tried, and its date.
    """

    megatron: tuple[int, int]
    name: str
    tried: str


BRANCHES = (
    Branch((0, 12), "26.1.0_core_r0.12.1", "57a3305 of 2026-07-20"),
    Branch((0, 15), "core_r0.15.3", "d0d5809 of 2026-04-21"),
    Branch((0, 16), "core_r0.16.0", "e477249 of 2026-07-10"),
)


def untried(megatron: str) -> str:
    """The warning about MindSpeed with a version of megatron-core with which no branch was tried; "" if one was.

    Args:
        megatron: a version such as "0.16.1".
    """
    if tuple(map(int, megatron.split(".")[:2])) in [branch.megatron for branch in BRANCHES]:
        return ""
    tried = ", ".join(f"{branch.name} (megatron-core {'.'.join(map(str, branch.megatron))})" for branch in BRANCHES)
    return (
        f"MindSpeed beside megatron-core {megatron} has not been tried with mindspeed_cp; tried: {tried}. Compare a "
        "short run with --context-parallel-size 1 before a long one."
    )


# Packages whose import activates MindSpeed with their own features -> (module to import, how it reads its settings).
FRONTS = {
    "mindspeed_llm": ("mindspeed_llm.tasks.megatron_adaptor_v2", "FeatureAdaptor.get_mindspeed_llm_args"),
    "mindspeed": ("mindspeed.megatron_adaptor", "get_full_args"),
}

# Packages built on MindSpeed whose models split and exchange sequences in their own code -> title.
SPLIT_THEMSELVES = {"mindspeed_mm": "MindSpeed-MM"}

# Functions by which MindSpeed's other features wrap models and batches, and that are part of its context parallelism.
# With --reset-attention-mask they assume MindSpeed's own layout, while here the batch's record contains documents; a
# constructor of attention exchanges heads around it. Module -> names, () for all.
_RESET = "mindspeed.core.transformer.flash_attention.reset_attention_mask"
LEFT_OUT = {
    f"{_RESET}.adaptor": (),
    f"{_RESET}.utils": ("get_batch_on_this_cp_rank_wrapper",),
    "mindspeed_llm.training.utils": ("get_batch_on_this_cp_rank_wrapper",),
    "mindspeed_llm.core.models.gpt.gpt_model": ("gpt_forward_wrapper",),
    "mindspeed_llm.core.transformer.attention": ("attention_forward",),
    "mindspeed_llm.core.models.common.embeddings.rotary_pos_embedding": ("apply_rotary_pos_emb_thd",),
    "mindspeed.core.transformer.attention": ("attention_init",),
}


@dataclass
class Neighbour:
    """This project's view of MindSpeed's features manager, whose patches (patches/features_manager.py) call it.

    Args:
        give_way: () undoes this project's patches.
        come_back: () applies them again.
        configure: converts MindSpeed's settings, name -> value, to the configuration.
        add_flags: adds this project's flags that a parser lacks.
        say: () prints which package does what.
        hand: (ends) sets the document ends of the next batch, as MindSpeed's dataset found them.
        kept: why context parallelism is left to MindSpeed, "" if it is done here.
    """

    give_way: Callable[[], None]
    come_back: Callable[[], None]
    configure: Callable[[dict[str, Any]], None]
    add_flags: Callable[[Any], Any]
    say: Callable[[], None]
    hand: Callable[[Any], None]
    kept: str = ""
    _hides: bool = False

    def prepares(self, prepare: Callable[[Any], None], settings: Any) -> None:
        """Called when MindSpeed applies the patches that are needed before Megatron is imported."""
        self.give_way()
        with self._shown_alone(settings):
            prepare(settings)

    def patches(self, patch: Callable[[Any], None], settings: Any) -> None:
        """Called when MindSpeed patches Megatron; afterwards this project's patches are applied on top."""
        self.give_way()
        with self._shown_alone(settings):
            patch(settings)
        if self.kept:
            self.say()
            return
        if size_of(settings) > 1:
            self.configure({name: value for name, value in vars(settings).items() if name != "cp_given"})
        self.come_back()

    def leaves_out(self, function: Any) -> bool:
        """Whether MindSpeed must not patch with ``function``, because this project replaces it."""
        names = LEFT_OUT.get(getattr(function, "__module__", ""))
        return self._hides and names is not None and (not names or function.__name__ in names)

    @contextmanager
    def _shown_alone(self, settings: Any) -> Iterator[None]:
        """Context manager that shows MindSpeed a context-parallel size of 1, unless it does context parallelism."""
        size = getattr(settings, SIZE, 1)
        self.kept = of_mindspeed_alone(settings, sys.argv[0])
        if self.kept or size_of(settings) == 1:
            yield
            return
        _refuse_two_dimensions(settings)
        setattr(settings, SIZE, 1)
        self._hides = True
        try:
            yield
        finally:
            self._hides = False
            setattr(settings, SIZE, size)

    def line(self) -> str:
        """One line that says which package does what; "" without MindSpeed."""
        if self.kept:
            return f"{self.kept}: context parallelism is left to MindSpeed ({folder()}), and mindspeed_cp is off"
        if not is_here():
            return ""
        return (
            f"MindSpeed ({folder()}): everything but context parallelism, which is mindspeed_cp's "
            f"({VARIABLE}=off leaves it to MindSpeed)"
        )


def size_of(settings: Any) -> int:
    """The context-parallel size in MindSpeed's settings, which may be text."""
    return int(getattr(settings, SIZE, None) or 1)


def of_mindspeed_alone(settings: Any, script: str) -> str:
    """Why these settings can only mean MindSpeed's own context parallelism; "" if they do not.

    Args:
        script: the running script. A package in SPLIT_THEMSELVES that it imports is known before the import.
    """
    imported = next((title for package, title in SPLIT_THEMSELVES.items() if package in packages_named_in(script)), "")
    if imported:  # with size 1 too: the model's own configuration file may contain another size
        return f"{imported}'s models split sequences themselves"
    name = getattr(settings, "context_parallel_algo", None)
    if size_of(settings) == 1 or name is None or name in ALGORITHMS:
        return ""
    return f"--context-parallel-algo {name} is MindSpeed's own"


def _refuse_two_dimensions(settings: Any) -> None:
    """Raise ValueError for MindSpeed's tensor parallelism in two dimensions, which widens context-parallel groups."""
    if getattr(settings, "tp_2d", False) and int(getattr(settings, "tp_y", 1)) > 1:
        raise ValueError(
            f"--tp-2d with --tp-y {settings.tp_y} splits the sequence over tensor-parallel ranks as well, which only "
            f"MindSpeed's own context parallelism knows; set {VARIABLE}=off, or leave --tp-2d out."
        )


def is_here() -> bool:
    """Whether a real MindSpeed is imported."""
    return FEATURES in sys.modules


def is_importable() -> bool:
    """Whether a real MindSpeed can be imported; this project's own import paths for it do not count."""
    if is_here():
        return True
    if "mindspeed" in sys.modules and getattr(sys.modules["mindspeed"], "__file__", None) is None:
        return False
    try:
        return importlib.util.find_spec(FEATURES.partition(".")[0]) is not None
    except ValueError:  # a module without a spec
        return False


def folder() -> str:
    """The folder that contains MindSpeed."""
    try:
        spec = importlib.util.find_spec("mindspeed")
    except ValueError:
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return str(Path(places[0]).parent) if places else "which is not importable"


def is_wrapped(owner: type) -> bool:
    """Whether this project patches a class by which MindSpeed replaced Megatron's.

    The class may inherit the patched method. Classes of MindSpeed's own context parallelism are excluded, because they
    exchange sequences themselves.
    """
    module = owner.__module__
    return module.partition(".")[0] in FRONTS and "context_parallel" not in module


def packages_named_in(script: str) -> list[str]:
    """The packages that a script imports, in order."""
    path = Path(script)
    text = path.read_text(errors="replace") if path.suffix == ".py" and path.is_file() else ""
    return re.findall(r"^\s*(?:from|import)\s+(\w+)", text, re.MULTILINE)


def front_named_in(script: str) -> str:
    """The package of FRONTS that a script imports, or ""."""
    named = packages_named_in(script)
    return next((package for package in FRONTS if package in named), "")


def settings_in_use() -> Any:
    """The settings with which MindSpeed has patched: Megatron's arguments if they exist, else the command line."""
    for module, reader in FRONTS.values():
        if found := sys.modules.get(module):
            return attrgetter(reader)(found)()
    return None


def activate(script: str) -> None:
    """Import the module that makes MindSpeed patch: the package of FRONTS that the script imports, else MindSpeed's."""
    module = FRONTS[front_named_in(script) or "mindspeed"][0]
    try:
        importlib.import_module(module)
    except ImportError as error:
        warn_rank0(f"MindSpeed lies in {folder()}, and importing {module} failed: {error}. It is left alone.")


def take_over() -> None:
    """If MindSpeed has patched before this project was imported, let it patch again without context parallelism."""
    settings = settings_in_use()
    if settings is None or size_of(settings) == 1:
        return
    manager = sys.modules[FEATURES].MindSpeedFeaturesManager
    manager.remove_patches()
    manager.apply_features_pre_patches(settings)
    manager.apply_features_patches(settings)


class AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Calls ``then`` once MindSpeed's features manager is imported, whoever imports it."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._loader: Any = None

    @classmethod
    def install(cls, then: Callable[[], None]) -> None:
        sys.meta_path.insert(0, cls(then))

    @classmethod
    def uninstall(cls) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, cls)]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != FEATURES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then()
