"""Imported first by every Python process that the tests start (conftest.py puts this folder on the path).

Importing torch and Megatron creates millions of permanent objects; scanning them repeatedly for garbage takes a third
of the time. A sitecustomize.py that this one shadows, such as that of the NPU test bed, is run afterwards.
"""

import gc
import os
import sys
import time
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import half_instructions

gc.set_threshold(100_000, 20, 20)

half_instructions.deny_if_asked()

# For a test: the RANK that imports torch for longer than the others wait for a silent peer, and the seconds.
if "TEST_LATE_RANK" in os.environ and os.environ["TEST_LATE_RANK"] == os.environ.get("RANK"):
    time.sleep(float(os.environ["TEST_LATE_SECONDS"]))

_here = os.path.realpath(os.path.dirname(__file__))
if _hidden := PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != _here]):
    _hidden.loader.exec_module(module_from_spec(_hidden))
