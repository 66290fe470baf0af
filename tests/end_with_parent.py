"""Importing this ends the process when its parent ends: a process that is stopped does not see its pipe close.

Processes forked from it call ``end_with_parent`` again, since the kernel forgets the wish at a fork.
"""

import ctypes
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


end_with_parent()
