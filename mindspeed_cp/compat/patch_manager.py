"""MindSpeed's registry of patches, for frameworks that search it; it holds none of this package's patches.

verl searches ``patches_info`` for a replaced torch.compile, ms-swift for a replaced delta rule, to remove them. This
package has no patch that they could remove, so the registry is empty; the adaptor's ``report`` lists what is patched.
"""

from typing import Any, ClassVar

__all__ = ["MindSpeedPatchesManager"]


class MindSpeedPatchesManager:
    """An empty registry that rejects entries."""

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
        """Does nothing, because nothing is registered; the adaptor applies its own patches."""

    @staticmethod
    def remove_patches() -> None:
        """Does nothing, because nothing is registered; the adaptor's ``undo`` removes its own patches."""
