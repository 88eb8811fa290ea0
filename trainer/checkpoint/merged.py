"""Reads the weights of a checkpoint with its adapters merged, for an engine that begins with them.

Invariant: what is read of any range is that range of W + scale B A, added in fp32; an adapter of
the engine's own is left as it is.
"""

from torch import Tensor

from forescale.checkpoint.reader import Checkpoint
from forescale.engine.portable.fragments import Fragment
from forescale.engine.portable.strips import strip_of
from forescale.models.adapters import adapter_of, is_adapter


class MergedReader:
    """Fills fragments of weights, as a FragmentReader does."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._last: tuple[str, Tensor] | None = None  # ranges of a matrix are read in turn

    def states(self, name: str) -> list[str]:
        """Return the names of a parameter's stored states."""
        return self._checkpoint.reader.states(name)

    def fill(self, fragment: Fragment) -> None:
        """Fill the data of a fragment, of any division, unless it is of an adapter."""
        f = fragment
        if is_adapter(f.name):
            return
        if adapter_of(f.name)[0] not in self._checkpoint.shapes:
            self._checkpoint.reader.fill(f)
            return
        if self._last is None or self._last[0] != f.name:
            self._last = None  # before the next is made
            self._last = f.name, self._checkpoint.merged(f.name).view(-1)
        whole = self._last[1]
        strip = strip_of([f.start, f.data.numel(), *(f.cut or ())])
        for at, place, size in strip.overlaps(strip.low, strip.high):
            f.data[place : place + size].copy_(whole[at : at + size])
