"""What a parameter is a part of, where ranks divide it. Imports no torch."""

from math import prod
from typing import Any, NamedTuple


class Whole(NamedTuple):
    """The parameter of which a rank holds the `part`-th of `parts` equal parts along dimension
    `dim`; its shape. An attribute `whole` of the part."""

    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1
    dim: int = 0

    @property
    def start(self) -> int:
        """Where the part begins in the flattened parameter, in elements, if it is one range."""
        return 0 if self.cut else self.part * (prod(self.shape) // self.parts)

    @property
    def cut(self) -> tuple[int, int, int] | None:
        """Of a part that is no range of the flattened parameter: from how many elements in a row it
        has how many, and the first of them, as (run, stride, first); else None."""
        if self.parts == 1 or prod(self.shape[: self.dim]) == 1:
            return None
        stride = prod(self.shape[self.dim :])
        run = stride // self.parts
        return run, stride, self.part * run


def whole_of(param: Any) -> Whole:
    """Return the parameter of which this one is a part: itself, unless ranks divide it. Its shape
    is full, even if ZeRO-3 has partitioned it."""
    whole = getattr(param, "whole", None)
    return whole or Whole(tuple(getattr(param, "ds_shape", param.shape)))
