"""The path by which ``compat.mapping`` was known before; import it from there."""

from mindspeed_cp.compat.mapping import *  # noqa: F403
from mindspeed_cp.compat.mapping import __all__, start_all_to_all  # noqa: F401
