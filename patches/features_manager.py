"""Patches of MindSpeed itself, if it is installed; they stay while the patches of Megatron are undone for it."""

import sys
from collections.abc import Callable
from typing import Any

from mindspeed_cp.megatron.neighbour import FEATURES, FRONTS, Neighbour
from mindspeed_cp.patches.rows import patch

MANAGER = f"{FEATURES}.MindSpeedFeaturesManager"


@patch(f"{MANAGER}.remove_patches", reason="MindSpeed finds Megatron as it left it")
def remove_patches(neighbour: Neighbour, original: Callable[..., None], cls: type) -> None:
    neighbour.give_way()
    original(cls)


@patch(f"{MANAGER}.apply_features_pre_patches", reason="MindSpeed patches first")
def apply_pre_patches(neighbour: Neighbour, original: Callable[..., None], cls: type, settings: Any) -> None:
    neighbour.prepares(lambda shown: original(cls, shown), settings)


@patch(f"{MANAGER}.apply_features_patches", reason="MindSpeed patches first, without its context parallelism")
def apply_patches(neighbour: Neighbour, original: Callable[..., None], cls: type, settings: Any) -> None:
    neighbour.patches(lambda shown: original(cls, shown), settings)


@patch(f"{MANAGER}.register_features_args", reason="a parser knows MindSpeed's flags, and this project's that it lacks")
def register_flags(neighbour: Neighbour, original: Callable[..., None], cls: type, parser: Any) -> None:
    original(cls, parser)
    if not neighbour.kept:
        neighbour.add_flags(parser)


@patch(
    "mindspeed.patch_utils.MindSpeedPatchesManager.register_patch",
    reason="nothing of MindSpeed exchanges or splits a sequence besides; documents are found by the batch's record",
)
def register_patch(
    neighbour: Neighbour, original: Callable[..., None], target: str, function: Any = None, *args: Any, **kwargs: Any
) -> None:
    if not neighbour.leaves_out(function):
        original(target, function, *args, **kwargs)


def megatron_is_to_come() -> str:
    """Why the patch below must wait: its modules import Megatron, which MindSpeed has to patch first; else ""."""
    patches = any(module in sys.modules for module, _ in FRONTS.values())
    return "" if patches and "megatron.core.parallel_state" in sys.modules else "MindSpeed has not patched yet"


@patch(
    "mindspeed.utils.set_actual_seq_len",
    "mindspeed.core.context_parallel.get_batch_utils.set_actual_seq_len",
    reason="where MindSpeed's dataset ends documents, they end here",
    when=megatron_is_to_come,
)
def set_actual_seq_len(neighbour: Neighbour, original: Callable[[Any], None], ends: Any) -> None:
    original(ends)
    neighbour.hand(ends)
