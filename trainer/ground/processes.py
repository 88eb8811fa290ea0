"""What a new process does before its work."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """In a new process: on Linux the kernel kills it when its parent dies, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def name_process(name: str) -> None:
    """Set the name of this process in lists of processes (15 characters at most)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME
