"""Imported by the server from which ranks are forked: imports the modules that an environment variable names.

The server ends with its parent, and so do ranks that call ``end_with_parent``, because a stopped process does not
notice that its pipe was closed. Garbage collection is off during the imports, where it would take a third of the time,
and skips the imported objects afterwards, because scanning them would copy them in every rank.
"""

import ctypes
import gc
import importlib
import os
import signal

IMPORTS = "RANK_SERVER_IMPORTS"
PR_SET_PDEATHSIG = 1


def end_with_parent():
    """Let this process be killed when its parent ends; the kernel resets this at a fork, so every process calls it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if IMPORTS in os.environ:
    end_with_parent()
    gc.disable()
    for name in os.environ.pop(IMPORTS).split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()
