"""MindSpeed's registry of patches, for frameworks that look through it; it holds none of this package's patches.

verl looks for a replaced torch.compile in ``patches_info``, ms-swift for a replaced delta rule; neither is replaced by
entries that such code could remove, so the registry is empty, and the adaptor's ``report`` lists what is patched.
"""

from typing import Any, ClassVar

__all__ = ["MindSpeedPatchesManager"]


class MindSpeedPatchesManager:
    """An empty registry that refuses entries."""

    patches_info: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def register_patch(
        orig_func_name: str, new_func: Any = None, force_patch: bool = False, create_dummy: bool = False
    ) -> None:
        raise NotImplementedError(
            f"{orig_func_name} cannot be patched through MindSpeedPatchesManager, which holds MindSpeed's own patches; "
            "set the attribute yourself, or use mindspeed_cp.patches.PatchManager."
        )

    @staticmethod
    def apply_patches() -> None:
        """Nothing is registered, so nothing is applied; the adaptor applies its own."""

    @staticmethod
    def remove_patches() -> None:
        """Nothing is registered, so nothing is removed; ``undo`` of the adaptor takes back its own."""
