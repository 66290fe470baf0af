"""The patches of Megatron, each with its reason, and the manager that applies and undoes them.

``areas`` lists the rows, one file per area of Megatron; ``rows`` says how a row is written; ``machine`` holds the
stand-ins for missing devices and libraries. Only ``mindspeed_cp.megatron_adaptor`` applies patches.
"""

from mindspeed_cp.patches.manager import Patch, PatchError, PatchManager, PatchRow

__all__ = ["Patch", "PatchError", "PatchManager", "PatchRow"]
