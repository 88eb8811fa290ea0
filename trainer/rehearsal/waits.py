"""Where the host waits for a device that isn't there, and what a place in the code is called.

Invariant: a place is a line of the job's own code or a library's, never one of the rehearsal.
"""

import linecache
import os
import re
import sys
import traceback
from collections import Counter
from types import FrameType

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from forescale import models


class Waits:
    """How often the host has waited for the device, by kind and place, while `counting`. total:
    what the integers of a list that it reads add up to; None: each is 1. assumed: where the user's
    code had a value last that no rehearsal knows; "" if it had none."""

    def __init__(self) -> None:
        self.counting = False
        self.total: int | None = None
        self.places: Counter[tuple[str, str]] = Counter()
        self.assumed = ""

    def add(self, kind: str) -> None:
        if self.counting:
            self.places[kind, place()] += 1

    def read(self, tensor: Tensor, kind: str = "read") -> None:
        """Note that values are read which aren't there: of the device the host waits for them."""
        if tensor.is_cuda:
            self.add(kind)
        if not (where := place()).startswith(("forescale/", "deepspeed/")):
            self.assumed = where


_HERE = os.path.dirname(__file__)
_PACKAGES = os.path.dirname(os.path.dirname(_HERE))
_TORCH = os.path.dirname(torch.__file__)
# Where the code is that Inductor writes: below this folder, or one whose name begins so.
INDUCTOR = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "torchinductor"
# What only calls others.
_BETWEEN = re.compile(rf"{re.escape(INDUCTOR)}|deepspeed/(accelerator|utils/nvtx)")
_COMPILED = re.compile(r"Source Nodes: \[(.*?)\]|Original path: (.*)")


def place() -> str:
    """Return the file and line of the innermost frame that is neither torch's nor the rehearsal's
    nor in between; in the code that torch's compiler has written, the variables of the model that
    are computed there; "autograd" where the backward pass alone has called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if INDUCTOR in name and (nodes := _nodes(name, frame.f_lineno)):
            return nodes
        if not name.startswith((_TORCH, _HERE, "<")) and not _BETWEEN.search(name):
            return f"{shorter(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def _nodes(name: str, line: int) -> str:
    """Return what the comment above a line of Inductor's code says that it computes, or where a
    kernel of the user's is."""
    for above in range(line, max(line - 40, 0), -1):
        if match := _COMPILED.search(linecache.getline(name, above)):
            return f"compiled {match[1]}" if match[1] else shorter(str(match[2]))
    return ""


# Of an editable installation our packages lie beside each other.
_FOLDERS = {
    os.path.dirname(models.__file__): "forescale/models",
    os.path.dirname(_HERE): "forescale",
}


def shorter(name: str) -> str:
    """Return the path of a file from its package on, or from this directory."""
    for folder, package in _FOLDERS.items():
        if name.startswith(f"{folder}/"):
            return f"{package}{name.removeprefix(folder)}"
    for top in (f"{_PACKAGES}/", "site-packages/", "dist-packages/"):
        if top in name:
            return name.rpartition(top)[2]
    return name.removeprefix(f"{os.getcwd()}/")


_UNANSWERED = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
# Of torch without a device, and of its compiler, which knows no pretended streams.
_NO_DEVICE = re.compile(
    r"NVIDIA driver|CUDA error|CUDA support|dummy base|ATen_cuda|'_cuda_|Could not run 'aten"
    r"|streams::|Expected StreamVariable|has no attribute 'user_object_index'"
)


def doubt(error: Exception, waits: Waits) -> str:
    """Return why an error may not be one on a GPU; "" if it would be."""
    *_, innermost = traceback.extract_tb(error.__traceback__) or [None]
    is_torch = innermost is not None and innermost.filename.startswith(_TORCH)
    if (
        isinstance(error, _UNANSWERED)
        or _NO_DEVICE.search(str(error))
        or (is_torch and isinstance(error, NotImplementedError | AssertionError))
    ):
        return "a rehearsal has no answer here, and a GPU may"
    if waits.assumed:
        return f"values are assumed at {waits.assumed}, and with others it may go on"
    return ""
