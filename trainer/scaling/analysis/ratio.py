"""A ratio of two independent estimates with its interval, and the spread of runs by their seed.

    log ratio    a - b; each of a and b has an interval of its own, which need not be symmetric
    its ends     by the square-and-add rule of Zou and Donner 2008 (Statistics in Medicine 27, 1693)
    spread       without the standard error of a held-out loss: all runs share its windows

Invariant: exchanging the two gives exactly the inverse, with the inverse ends.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Ratio:
    """A ratio of the two sides and its interval; 0 or infinite where a side never has the loss."""

    value: float
    low: float
    high: float

    @property
    def includes_one(self) -> bool:
        """Return True if its interval includes 1, so that no difference is shown."""
        return self.low <= 1 <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON; what is 0 or unbounded is None."""
        value, low, high = (
            x if 0 < x < np.inf else None for x in (self.value, self.low, self.high)
        )
        return {"value": value, "low": low, "high": high, "includes_one": self.includes_one}


def inverse(ratio: Ratio) -> Ratio:
    """Return 1 / ratio: the ratio with the sides exchanged."""
    with np.errstate(divide="ignore"):
        value, low, high = np.divide(1.0, [ratio.value, ratio.high, ratio.low])
    return Ratio(float(value), float(low), float(high))


def ratios(one: Array, other: Array) -> list[Ratio]:
    """Return exp(one - other) with intervals. one, other: logs with their ends, (3, K) each.

    The distance of an end is the root of the sum of squares of the distances of the ends that move
    the difference that way. A loss that a side never reaches has an infinite log.
    """
    (a, a_low, a_high), (b, b_low, b_high) = one, other
    with np.errstate(invalid="ignore"):
        low = a - b - np.hypot(a - a_low, b_high - b)
        high = a - b + np.hypot(a_high - a, b - b_low)
        low = np.where(np.isnan(low), a_low - b_high, low)
        high = np.where(np.isnan(high), a_high - b_low, high)
        rows = np.exp(np.stack((a - b, low, high), axis=1))
    return [Ratio(*map(float, row)) for row in rows]
