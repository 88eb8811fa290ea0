"""What a new process does before its work."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """In a new process: on Linux the kernel kills it when its parent dies, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
