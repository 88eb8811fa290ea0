"""The spread of runs that differ in their seed alone.

Invariant: it is the scatter of one run when it is repeated. The standard error of a held-out loss
is not part of it: all runs are scored on the same windows, so that they share that error.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from forescale.scaling.fitting.points import Array


@dataclass(frozen=True)
class Spread:
    """A standard deviation of log loss over seeds, and its degrees of freedom (`free`); nan and 0
    without repeated runs."""

    sd: float
    free: int

    @classmethod
    def within(cls, groups: Iterable[Array]) -> "Spread":
        """Return the spread of log losses within groups, pooled over them."""
        repeated = [y for y in groups if len(y) > 1]
        free = sum(len(y) - 1 for y in repeated)
        squares = sum(float(np.square(y - y.mean()).sum()) for y in repeated)
        return cls(float(np.sqrt(squares / free)) if free else float("nan"), free)
