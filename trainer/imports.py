"""What a process imports, and how it does so in less time.

Invariant: `forescale VERB --help`, `status` and, until its run is complete, the launcher of ranks
import no torch, and only ranks that compile their model import torch's compiler, a second of each.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_imports() -> Iterator[None]:
    """Keep Python's garbage collector out of the imports inside, if torch is still to be imported.

    Nothing that they make is garbage, and there are a million objects: to search them again and
    again took a fifth of the time, and later collections searched them all. None will do so now.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
