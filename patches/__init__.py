"""Everything that knows Megatron: what is changed in it, each with its reason, and the manager that changes it back.

``areas`` lists the rows, one file for each area of Megatron; ``rows`` says how a row is written, ``machine`` holds the
stand-ins for machines and libraries. Only ``mindspeed_cp.megatron_adaptor`` applies them.
"""

from mindspeed_cp.patches.manager import Patch, PatchError, PatchManager, PatchRow

__all__ = ["Patch", "PatchError", "PatchManager", "PatchRow"]
