"""Forecasts of larger budgets by level and shape apart, each with its own doubt.

    minimum   the continued level of a budget (level.py)
    run       that level, plus the run's excess by the shape (shape.py)
    doubt     prior scales, corrected by the errors that the same method made at earlier origins

Invariant: a forecaster reads the runs of the budgets that it knows, and nothing beyond them; its
doubt too. Errors are of log loss.

The constants were chosen by backtests on nine public tables (analysis/backtest.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from forescale.scaling.fitting.points import Array, Points, spent
from forescale.scaling.forecasting.level import Levels, extrapolate, levels
from forescale.scaling.forecasting.predictor import AHEAD, BELIEF, Predicted
from forescale.scaling.forecasting.shape import Shape, fit_shape

LEVEL = 0.0015  # deviation of a level that is not extrapolated: half of a level's noise
# Of a level beyond the last budget: PER_DECADE * decades^POWER. A known slope would give the power
# 1, a drifting one 3/2; the errors on the tables are between.
PER_DECADE, POWER = 0.0125, 1.25
RUN, EXCESS = 0.001, 0.2  # of a run about its level: a floor, and a share of its excess

FADE = 0.5  # weight of an earlier forecast, for every budget that has been added since
FREEDOM = 4  # of Student's t: a few errors are known, and some tables break
_LEAST = 2  # budgets that a curve is continued from
_SAME = 1.001  # a budget within this factor of the last known one isn't larger
# Budgets that can be continued, and sizes that each must have: with fewer sizes the lowest loss of
# a budget isn't known.
BUDGETS, SIZES = 3, 3


@dataclass(frozen=True)
class Forecaster:
    """The forecaster of a study's known runs. scales: what earlier errors make of the prior doubts
    of the level, and of a run about its level; earlier: number of the earlier forecasts of a budget
    that these are from."""

    levels: Levels
    shape: Shape
    scales: tuple[float, float] = (1.0, 1.0)
    earlier: int = 0

    def minimum(self, budget: float) -> Predicted:
        level = self._level(budget)
        return replace(level, log_loss=level.log_loss + self.levels.offset)

    def of_runs(self, columns: Mapping[str, Array], flops: Array, budget: float) -> Predicted:
        level = self._level(budget)
        n, d = np.log(columns["parameters"]), np.log(columns["tokens"])
        excess = self.shape.excess(n, d, np.log(budget))
        about = self.scales[1] * np.hypot(RUN, EXCESS * excess)
        return Predicted(level.log_loss + excess, np.hypot(level.deviation, about), FREEDOM)

    def is_beyond(self, budget: float) -> bool:
        """Return True if a budget is larger than the last known one."""
        return budget > _SAME * float(np.exp(self.levels.log_budgets[-1]))

    def _level(self, budget: float) -> Predicted:
        x, target = self.levels.log_budgets, float(np.log(budget))
        decades = max(0.0, target - float(x[-1])) / np.log(10)
        doubt = self.scales[0] * np.hypot(LEVEL, PER_DECADE * decades**POWER)
        center = extrapolate(x, self.levels.smooth, target)
        return Predicted(np.array(center), np.array(doubt), FREEDOM)

    def errors(self, later: Points, budget: float) -> tuple[float, float]:
        """Return the errors at the runs of a later budget, in deviations of this forecaster. The
        first is that of the minimum. The second is the mean over runs of the error of a run less
        that of the minimum, over the deviation of the run about its level."""
        lowest = self.minimum(budget)
        each = self.of_runs(later.columns(("parameters", "tokens")), spent(later), budget)
        at_minimum = lowest.log_loss - np.log(later.loss.min())
        about = np.sqrt(np.maximum(each.deviation**2 - lowest.deviation**2, RUN**2))
        apart = np.abs(each.log_loss - np.log(later.loss) - at_minimum)
        return float(np.abs(at_minimum) / lowest.deviation), float(np.mean(apart / about))


def continued(budgets: Array, parameters: Array) -> Array:
    """Return the mask of the runs whose budgets have SIZES sizes or more, (n,); no run if they are
    fewer than BUDGETS. budgets, parameters: nominal budget and N of each run, (n,)."""
    sizes = np.log(parameters).round(3)
    distinct = np.unique(budgets)
    usable = [c for c in distinct if len(np.unique(sizes[budgets == c])) >= SIZES]
    return np.isin(budgets, usable if len(usable) >= BUDGETS else [])


def forecasters(points: Points, budgets: Array) -> Iterator[Forecaster]:
    """Yield the forecaster of the first two budgets, of the first three, and so on up to all.

    budgets: the nominal budget of each run, (n,). Each one is calibrated by the errors of those
    before it at the budgets that it knows itself:

        scale = (BELIEF + sum w |z|) / (BELIEF + sum w),  w = FADE^(budgets known since)

    with an error z for each earlier forecaster at the next budget and the one after.
    """
    distinct, earlier = np.unique(budgets), list[Forecaster]()
    errors, ages = np.empty((0, 2)), np.empty(0)
    for last in distinct[_LEAST - 1 :]:
        ages = ages + 1
        if earlier:
            at_last = points.take(budgets == last)
            new = [one.errors(at_last, float(last)) for one in earlier[-len(AHEAD) :]]
            errors, ages = np.vstack((errors, new)), np.append(ages, np.zeros(len(new)))
        known = budgets <= last
        runs = points.take(known)
        earlier.append(Forecaster(levels(runs, budgets[known]), fit_shape(runs, budgets[known])))
        w = FADE**ages
        scales = (BELIEF + w @ errors) / (BELIEF + w.sum())
        both = float(scales[0]), float(scales[1])
        yield replace(earlier[-1], scales=both, earlier=len(ages))
