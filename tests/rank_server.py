"""What the server from which ranks are forked imports last.

It ends with its parent, and so do ranks that call ``end_with_parent``: a process that is stopped does not see its pipe
close. What has been imported is kept out of garbage collection, which would look through it, and so copy it, in every
rank.
"""

import ctypes
import gc
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent():
    """The kernel forgets this wish at a fork, so that every process says it anew."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


end_with_parent()
gc.collect()
gc.freeze()
