"""Forecasts of larger budgets by level and shape apart, each with its own doubt.

    minimum   a combination of three continuations of the budgets' lowest losses (combination.py)
    run       that minimum, plus the run's excess by the shape (shape.py)
    doubt     prior scales and the parts' disagreement, corrected by the errors that the same method
              made at earlier origins

Invariant: a forecaster reads the runs of the budgets that it knows, and nothing beyond them; its
doubt too. Errors are of log loss.

The constants were chosen by backtests on nine public tables (analysis/backtest.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from forescale.scaling.fitting.points import Array, Points, spent
from forescale.scaling.forecasting.combination import PARTS, Parts, parts_of, weights
from forescale.scaling.forecasting.level import Levels, levels
from forescale.scaling.forecasting.predictor import Predicted
from forescale.scaling.forecasting.shape import Shape, fit_shape

LEVEL = 0.0012  # deviation of a level that is not extrapolated
NOISE = 0.25  # of a level too: this share of the noise of a run
# Of a level beyond the last budget: PER_DECADE * decades^POWER, and APART of the deviation of the
# parts from their combination.
PER_DECADE, POWER, APART = 0.01, 0.85, 0.75
RUN, EXCESS = 0.001, 0.2  # of a run about its level: a floor, and a share of its excess

# Weight of the error of an earlier forecast: FADE for every budget added since, and half, because
# forecasts of one origin err alike. One of more than MOST deviations counts as MOST.
FADE, HALF, MOST = 0.7, 0.5, 5.0
BELIEF = 1  # the prior doubts count as so many errors
TYPICAL = 0.75  # of an error, in deviations: what the mean of |t| leaves of a well-calibrated one
FREEDOM = 4  # of Student's t: a few errors are known, and some tables break
_LEAST = 2  # budgets that a curve is continued from
_SAME = 1.001  # a budget within this factor of the last known one isn't larger
# Budgets that can be continued, and sizes that each must have: with fewer sizes the lowest loss of
# a budget isn't known.
BUDGETS, SIZES = 3, 3


@dataclass(frozen=True)
class Forecaster:
    """The forecaster of a study's known runs. weights: of the parts, (3,); scales: what earlier
    errors make of the prior doubts of the minimum, and of a run about it; earlier: number of the
    earlier forecasts of a budget that these are from."""

    levels: Levels
    shape: Shape
    parts: Parts
    weights: Array
    scales: tuple[float, float] = (1.0, 1.0)
    earlier: int = 0

    def minimum(self, budget: float) -> Predicted:
        x = self.levels.log_budgets
        decades = max(0.0, float(np.log(budget)) - float(x[-1])) / np.log(10)
        each = self.parts.at(budget)
        has = self.weights > 0
        center = self.weights[has] @ each[has]
        apart = self.weights[has] @ np.square(each[has] - center)
        noise = 0.0 if np.isnan(self.parts.noise) else NOISE * self.parts.noise
        further = PER_DECADE * decades**POWER
        doubt = np.sqrt(LEVEL**2 + noise**2 + further**2 + APART**2 * apart)
        return Predicted(np.array([center]), np.array([self.scales[0] * doubt]), FREEDOM)

    def of_runs(self, columns: Mapping[str, Array], flops: Array, budget: float) -> Predicted:
        lowest = self.minimum(budget)
        n, d = np.log(columns["parameters"]), np.log(columns["tokens"])
        excess = self.shape.excess(n, d, np.log(budget))
        about = self.scales[1] * np.hypot(RUN, EXCESS * excess)
        # A run is no minimum of several noisy ones.
        center = lowest.log_loss - self.levels.offset + excess
        return Predicted(center, np.hypot(lowest.deviation, about), FREEDOM)

    def is_beyond(self, budget: float) -> bool:
        """Return True if a budget is larger than the last known one."""
        return budget > _SAME * float(np.exp(self.levels.log_budgets[-1]))

    def errors(self, later: Points, budget: float) -> tuple[float, float]:
        """Return the errors at the runs of a later budget, in deviations of this forecaster. The
        first is that of the minimum. The second is the mean over runs of the error of a run less
        that of the minimum, over the deviation of the run about its level."""
        lowest = self.minimum(budget)
        each = self.of_runs(later.columns(("parameters", "tokens")), spent(later), budget)
        at_minimum = float(lowest.log_loss[0] - np.log(later.loss.min()))
        about = np.sqrt(np.maximum(each.deviation**2 - lowest.deviation**2, RUN**2))
        apart = np.abs(each.log_loss - np.log(later.loss) - at_minimum)
        return abs(at_minimum) / float(lowest.deviation[0]), float(np.mean(apart / about))


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
    before it at the budgets that it knows itself: they move the weights of its parts, and

        scale = (BELIEF + sum w |z|) / (BELIEF + sum w),  w = HALF FADE^(budgets known since)

    with an error z of each earlier forecaster at each later budget; that of a minimum is TYPICAL z.
    """
    distinct, earlier = np.unique(budgets), list[Forecaster]()
    errors, ages = np.empty((0, 2)), np.empty(0)
    by_part, decades = np.empty((0, len(PARTS))), np.empty(0)
    for last in distinct[_LEAST - 1 :]:
        ages = ages + 1
        if earlier:
            at_last = points.take(budgets == last)
            new = [one.errors(at_last, float(last)) for one in earlier]
            errors, ages = np.vstack((errors, new)), np.append(ages, np.zeros(len(new)))
        if old := [one for one in earlier if len(one.levels.smooth) >= BUDGETS]:
            lowest = np.log(at_last.loss.min())
            by_part = np.vstack((by_part, [one.parts.at(float(last)) - lowest for one in old]))
            ends = np.array([one.levels.log_budgets[-1] for one in old])
            decades = np.append(decades, (np.log(last) - ends) / np.log(10))
        known = budgets <= last
        runs = points.take(known)
        of_budgets, shape = levels(runs, budgets[known]), fit_shape(runs, budgets[known])
        parts = parts_of(runs, budgets[known], of_budgets, shape.per)
        w = weights(parts.prior, by_part, decades)
        earlier.append(Forecaster(of_budgets, shape, parts, w))
        v = HALF * FADE**ages
        sizes = np.minimum(errors, MOST) * [TYPICAL, 1.0]
        mean = (BELIEF + v @ sizes) / (BELIEF + v.sum())
        both = float(mean[0]), float(mean[1])
        yield replace(earlier[-1], scales=both, earlier=len(ages))
