"""The version of the Megatron that would be imported, from a wheel or a checkout; metadata knows only the wheel."""

import runpy

from mindspeed_cp.patches.fit import core_folder

VERSION = runpy.run_path(str(core_folder() / "package_info.py"))["__version__"].split("rc")[0]
MINOR = tuple(int(part) for part in VERSION.split(".")[:2])
