"""Importing this module patches Megatron; ``python -m mindspeed_cp.megatron_adaptor`` lists every patch.

Import it before Megatron. With context_parallel_size 1 and without flags, Megatron behaves exactly as without the
import. This is the only module of the package that reads the environment (MINDSPEED_CP_DEVICE, MINDSPEED_CP) or has
global state. If MindSpeed is importable, it patches first and does everything except context parallelism.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_cp import compat
from mindspeed_cp.megatron import neighbour
from mindspeed_cp.patches.machine import choice as machine
from mindspeed_cp.patches.machine.choice import DEVICE_VARIABLE
from mindspeed_cp.patches.versions import DEFAULT, MEGATRONS
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import is_rank0, warn_rank0
from mindspeed_cp.settings.training_setup import TrainingSetup

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor
    from mindspeed_cp.megatron.records import MicroBatch
    from mindspeed_cp.patches.areas import Applied
    from mindspeed_cp.patches.beside import Beside
    from mindspeed_cp.patches.manager import Patch, PatchManager, PatchRow

TRIED_VERSIONS = tuple(row.version for row in MEGATRONS)
# Modules that a script imports for a model; "import megatron.core" alone, to read the version, imports none of them.
MODEL_CODE = (
    "megatron.training",
    "megatron.legacy",
    "megatron.core.models.gpt",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.dot_product_attention",
    "megatron.core.transformer.transformer_block",
)
_modules_before = frozenset(sys.modules)
_state: "Adaptor"
_manager: "PatchManager"
_beside: "Beside"  # MindSpeed, if it is importable
_tables: "dict[str, list[Patch]]"  # name -> patches, in the order of application


def _require_megatron() -> None:
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ImportError(
            "mindspeed_cp.megatron_adaptor needs Megatron, and there is no megatron.core; run "
            f"pip install megatron-core=={DEFAULT}, or put a Megatron-LM checkout on PYTHONPATH."
        )


def megatron_version() -> str:
    """Version of the imported megatron.core, "unknown" if it does not say."""
    from megatron.core import package_info

    version: str = getattr(package_info, "__version__", "unknown")
    return version.split("rc")[0]


def _device_choice() -> str:
    return os.environ.get(DEVICE_VARIABLE, "")


def _announce(config: ContextParallelConfig) -> None:
    """Print on rank 0 what is on; before that, every rank checks its essential patches."""
    check()
    if is_rank0():
        alive, _ = _num_cp_patches()
        said = f"{config.describe()}, kernel {_kernel()}, {alive} patches{_beside.default_said(config)}"
        print(f"Context parallelism: {said}", flush=True)
        _beside.say()


def _tell(record: "MicroBatch") -> str:
    """The block of at most eight lines that rank 0 prints right before the first batch is computed."""
    from mindspeed_cp.megatron.first_batch import start_of
    from mindspeed_cp.settings.start_block import start_block

    config = _state.main.config if record.scope is None else record.scope.config
    alive, lost = _num_cp_patches()
    block = start_block(start_of(record, config, _kernel(), (alive, alive + lost)), has_log=config.log)
    if is_rank0():
        print(block, flush=True)
    return block


def _kernel() -> str:
    from mindspeed_cp.kernels import KERNELS, cpu

    device = machine.device_type(_device_choice())
    automatic = [name for name, row in KERNELS.items() if row.automatic and row.device_type == device]
    kernel = _state.kernel or automatic[0]
    half = _state.setup.half_precision if _state.setup else None
    return f"{kernel} ({half} in float32)" if kernel == "cpu" and half and cpu.is_slow(getattr(torch, half)) else kernel


def _num_cp_patches() -> tuple[int, int]:
    """(number of context-parallel patches that are alive, number that others have replaced); without stand-ins."""
    from mindspeed_cp.patches.areas import STAND_INS

    stand_in = {patch.target for table in STAND_INS for patch in _tables[table]}
    own = [row for row in _manager.report() if row.target not in stand_in]
    return sum(row.applied for row in own), sum(row.is_lost for row in own)


def _warn_of_version() -> None:
    version = megatron_version()
    if version not in TRIED_VERSIONS:
        warn_rank0(
            f"megatron-core {version} has not been tried with mindspeed_cp; tried: {', '.join(TRIED_VERSIONS)}. "
            "Every patch was applied; compare a short run with --context-parallel-size 1 before a long one."
        )


def _warn_of_late_import() -> None:
    first = [name for name in MODEL_CODE if name in _modules_before]
    if not first or neighbour.is_here():  # MindSpeed imports Megatron when it patches
        return
    copies = [
        copy
        for target, copy in _manager.copies()
        if target.startswith("megatron.") and copy.rpartition(".")[0] in _modules_before
    ]
    copies.sort(key=lambda copy: copy.startswith("megatron."))  # the script's own copies come first
    named = f" ({', '.join(copies[:3])}{', ...' if len(copies) > 3 else ''})" if copies else ""
    warn_rank0(
        f"Megatron was imported before mindspeed_cp.megatron_adaptor ({', '.join(first)}): {len(copies)} copies of "
        f"patched names were rebound{named}. A copy that is not a module's own attribute, such as a default argument "
        "or an entry of a table, is still Megatron's; put import mindspeed_cp.megatron_adaptor first in the script."
    )


def apply() -> None:
    """Apply all patches or none; a second call does nothing.

    Raises:
        ImportError: Megatron is missing.
        PatchError: a name to be patched is missing; nothing was changed.
    """
    if _manager.num_applied:
        return
    _beside.meet(os.environ.get(neighbour.VARIABLE, ""), machine.device_type(_device_choice()))
    if _beside.kept:  # do not import Megatron, since MindSpeed may have to patch before
        return
    _beside.come_back()
    compat.install()
    _warn_of_version()


def undo() -> None:
    """Restore every attribute of Megatron and torch to its original object, and forget the configuration."""
    _state.forget_batches()
    compat.uninstall()
    _manager.undo()
    _beside.leave()
    _state.reset()


def report() -> "list[PatchRow]":
    """One row (target, reason, status) per patch."""
    rows: list[PatchRow] = _manager.report()
    return rows


def check() -> None:
    """Check that the names of all essential patches still lead to this project's functions; cheap.

    Raises:
        PatchError: somebody else replaced a name and does not call this project's function; the message says who, and
            what to do about it.
    """
    from mindspeed_cp.patches.areas import essential_targets
    from mindspeed_cp.patches.owners import WRAPPED_ANEW

    targets = essential_targets(_tables)
    _manager.wrap_anew(targets, WRAPPED_ANEW)
    _manager.check(targets)


def configure(
    config: ContextParallelConfig,
    *,
    setup: TrainingSetup | None = None,
    kernel: str | None = None,
    documents_from_position_ids: bool = False,
    end_of_document: int | Callable[[], int] | None = None,
    image_token_id: int | None = None,
) -> TrainingSetup | None:
    """Set the configuration for scripts without Megatron's flags; call it before initialize_model_parallel.

    Args:
        config: ContextParallelConfig.
        setup: TrainingSetup; checked against ``config``, with every fallback applied.
        kernel: name of an attention kernel, None to choose by device.
        documents_from_position_ids: if the batch has no mask, a document begins where position ids restart at 0.
        end_of_document: the last token of each document, or a function that returns it when a batch is split; used if
            the batch has no mask.
        image_token_id: the token of image patches: consecutive ones see each other, while text stays causal. The batch
            must not have a mask.

    Returns:
        The setup after all fallbacks, None if none was given.
    """
    from mindspeed_cp.megatron import following
    from mindspeed_cp.settings.training_setup import resolve

    if setup is not None:
        known = len(setup.notices)
        setup = resolve(config, setup)
        for notice in setup.notices[known:]:
            warn_rank0(notice)
    following.configure(
        _state,
        config,
        setup=setup,
        kernel=kernel,
        documents_from_position_ids=documents_from_position_ids,
        end_of_document=end_of_document,
        image_token_id=image_token_id,
    )
    return setup


def configure_from(settings: Any) -> ContextParallelConfig | None:
    """Set the configuration from a framework's own settings.

    May be called again with other settings before the process groups exist; each call replaces the previous one. The
    command line is not read.

    Args:
        settings: a dict, a namespace or a dataclass with the names of Megatron's and MindSpeed's arguments. Missing
            settings get the flags' defaults, unknown names are ignored. The context-parallel size may be left to
            initialize_model_parallel, the algorithm to cp_comm_type of the TransformerConfig.

    Returns:
        The ContextParallelConfig, None while the size is not known.

    Raises:
        ValueError: a value or a combination is invalid, or existing process groups do not fit.
    """
    from mindspeed_cp.arguments import FrameworkSettings
    from mindspeed_cp.megatron import following

    following.configure_from(_state, FrameworkSettings.read(settings))
    return _state.config


def repatch(settings: Any) -> ContextParallelConfig | None:
    """``configure_from`` under the name of MindSpeed's function, with MindSpeed's default algorithm."""
    from mindspeed_cp.megatron import following
    from mindspeed_cp.patches.beside import by_mindspeed

    following.configure_from(_state, by_mindspeed(settings))
    return _state.config


def compare_on_all_ranks(args: Any, *, program: str = "") -> None:
    """Let initialize_model_parallel stop all ranks if their ``args`` differ in settings of model and training.

    The configuration and the versions are always compared. Call this before initialize_model_parallel.

    Args:
        args: namespace or dict with Megatron's names; ``mindspeed_cp.arguments.compared`` lists what is compared.
        program: name of the program whose flags these are; on a difference it ends with status 2 and one line on rank
            0. Without a name, every rank raises a ValueError instead.
    """
    from mindspeed_cp.arguments import compared_arguments

    _state.settings.compared, _state.settings.program = compared_arguments(args), program


def state() -> "Adaptor":
    """The current Adaptor, with config, setup, groups, layout(seq_len), shard_batch, gather_sequence."""
    return _state


def _applied() -> "Applied":
    from mindspeed_cp.patches.areas import Applied

    rows, choice = iter(report()), _device_choice()
    return Applied(
        megatron_version(),
        machine.device_type(choice),
        machine.why_device(choice),
        sorted(name for name in MODEL_CODE if name in _modules_before),
        {name: [next(rows) for _ in patches] for name, patches in _tables.items()},
    )


def _build() -> None:
    from mindspeed_cp.megatron.adaptor import Adaptor
    from mindspeed_cp.patches.areas import all_areas
    from mindspeed_cp.patches.beside import Beside
    from mindspeed_cp.patches.manager import PatchManager

    global _state, _tables, _manager, _beside
    _state = Adaptor(_announce, check, _tell)
    _manager = PatchManager(subject=lambda: f"megatron-core {megatron_version()}", is_wrapped=neighbour.is_wrapped)
    _beside = Beside(_state, _manager)
    _tables = all_areas(_state, _device_choice())
    for patches in _tables.values():
        _manager.add(patches)


_require_megatron()
if __name__ == "__main__":
    from mindspeed_cp.patches import areas

    # Import the module under its own name, because __main__ would be a second copy.
    areas.main(lambda: importlib.import_module("mindspeed_cp.megatron_adaptor")._applied())
    sys.exit()
_build()
apply()
_warn_of_late_import()
