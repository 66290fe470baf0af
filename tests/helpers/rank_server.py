"""What the server from which ranks are forked imports: the modules that the environment names.

It ends with its parent, and so do ranks that call ``end_with_parent``: a process that is stopped does not see its pipe
close. Garbage collection waits until everything is imported, of which it takes a third of the time, and leaves that
alone afterwards, because it would look through it, and so copy it, in every rank.
"""

import ctypes
import gc
import importlib
import os
import signal

IMPORTS = "RANK_SERVER_IMPORTS"
PR_SET_PDEATHSIG = 1


def end_with_parent():
    """The kernel forgets this wish at a fork, so that every process says it anew."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if IMPORTS in os.environ:
    end_with_parent()
    gc.disable()
    for name in os.environ.pop(IMPORTS).split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()
