"""Everything that knows Megatron: what is changed in it, each with its reason, and the manager that changes it back.

``core`` and ``training`` list the tables, one file for each thing that is patched; ``attention`` leads from Megatron's
core attention to ours; ``device`` is the stand-in for machines without an accelerator, ``npu`` the switch to Ascend's.
Only ``mindspeed_cp.megatron_adaptor`` applies them.
"""

from mindspeed_cp.patches.manager import Patch, PatchError, PatchManager, PatchRow

__all__ = ["Patch", "PatchError", "PatchManager", "PatchRow"]
