"""The base's own loss against compute, read backwards: the compute at which it has a loss.

Between two budgets of the base log(L - floor) is a straight line over log C, which is exact for a
power law with that floor. The floor is the one for which all budgets are nearest to one line. In
simulations of laws with and without a floor and of one that bends, the compute is off by at most
0.5 % so; straight lines of log L are off by up to 2.6 %, and cubic ones scatter more.

Invariant: nothing is extrapolated. A loss above all of the base's has log C = -inf, one below all
of them inf.
"""

import numpy as np
from scipy.optimize import isotonic_regression

from forescale.scaling.fitting.points import Array

_FLOORS = np.linspace(0.0, 0.97, 98)  # tried floors, in units of the lowest loss
_LEAST = 3  # budgets that tell a floor
_HEADROOM = 1e-6  # of the lowest loss, that stays above the floor in each drawn curve


class BaseCurve:
    """The base at its budgets. log_flops: (k,), increasing; log_losses: (k,), the mean of its
    runs."""

    def __init__(self, log_flops: Array, log_losses: Array):
        self.log_flops, self.log_losses = log_flops, log_losses
        self.floor = floor_of(log_flops, log_losses)

    @property
    def is_falling(self) -> bool:
        """True if each budget has a lower loss than the one before."""
        return bool((np.diff(self.log_losses) < 0).all())

    def log_compute(self, log_losses: Array, nodes: Array | None = None) -> Array:
        """Return log C at which the base has these losses, (..., m).

        nodes: (..., k), other log losses of its budgets, such as drawn ones. Where they rise with
        C, they are replaced by the nearest ones that don't.
        """
        own = np.array(self.log_losses if nodes is None else nodes)
        for at in map(tuple, np.argwhere((np.diff(own) > 0).any(axis=-1))):
            own[at] = isotonic_regression(own[at], increasing=False).x
        heights, wanted = self._height(own), self._height(log_losses)
        above = (heights[..., None, :] >= wanted[..., None]).sum(axis=-1)  # budgets, (..., m)
        last = np.clip(above, 1, len(self.log_flops) - 1)
        left, right = (np.take_along_axis(heights, i, axis=-1) for i in (last - 1, last))
        start, end = self.log_flops[last - 1], self.log_flops[last]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (left - wanted) / (left - right)  # 0 / 0 where two budgets have one loss
        found = start + np.nan_to_num(share, nan=0.0) * (end - start)
        found = np.where(wanted > heights[..., :1], -np.inf, found)
        return np.asarray(np.where(wanted < heights[..., -1:], np.inf, found))

    def _height(self, log_losses: Array) -> Array:
        """Return log(L - floor)."""
        losses = np.exp(log_losses)
        found: Array = np.log(np.maximum(losses - self.floor, _HEADROOM * losses))
        return found


def floor_of(log_flops: Array, log_losses: Array) -> float:
    """Return the floor for which log(L - floor) is nearest to a straight line over log C, by the
    squares of the residuals of log L; 0 if there are too few budgets to tell."""
    if len(log_flops) <= _LEAST:
        return 0.0
    losses = np.exp(log_losses)
    floors = _FLOORS * losses.min()

    def off(floor: float) -> float:
        line = np.polyfit(log_flops, np.log(losses - floor), 1)
        fitted = floor + np.exp(np.polyval(line, log_flops))
        return float(np.square(np.log(fitted) - log_losses).sum())

    return float(min(floors, key=off))
