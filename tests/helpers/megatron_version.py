"""The version of the Megatron that an import finds, be it a wheel's or a checkout's; metadata knows the wheel alone."""

import runpy

from mindspeed_cp.patches.fit import core_folder

VERSION = runpy.run_path(str(core_folder() / "package_info.py"))["__version__"].split("rc")[0]
MINOR = tuple(int(part) for part in VERSION.split(".")[:2])
