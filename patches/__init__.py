"""What is changed in Megatron, and the manager that changes it back.

``core`` and ``training`` hold the tables; ``device`` holds the stand-in for machines without an accelerator. Only
``mindspeed_cp.megatron_adaptor`` applies them.
"""

from mindspeed_cp.patches.manager import Patch, PatchError, PatchManager, PatchRow

__all__ = ["Patch", "PatchError", "PatchManager", "PatchRow"]
