"""A combination of three ways to continue the lowest losses of a study's budgets.

    level      E + K C^-gamma with a slow drift (level.py): too high far away, where losses go on
               falling as they did
    straight   log loss straight in log C, through the last two levels: too low far away, where
               they flatten
    law        the Chinchilla law of the runs near the optimum: best where they follow it exactly

The errors of the first two have opposite signs on most tables, so that a combination errs less than
the better of them. The weights start from PRIOR, move to the law by how closely it fits the runs,
and move by the errors that each way made at earlier origins of the same study.

Invariant: weights are at least 0 and sum to 1. They read errors up to the origin alone.

The constants were chosen by backtests on nine public tables (analysis/backtest.py), and by
simulated power laws. Up to 40 times the compute, the other values of PRIOR, EXACT and HELD that
were tried (a third to three times of HELD, a half to one and a half of EXACT) move the skill
against a straight line by some hundredths.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from forescale.ground.errors import UserError
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, near_best
from forescale.scaling.forecasting.level import Levels, extrapolate

PARTS = "level", "straight", "law"
PRIOR = np.array([1.0, 1.0, 0.2]) / 2.2  # of the parts; the law alone errs most on public tables
EXACT = 0.002  # of log loss: the law has half of the prior if its residuals are as small as this
HELD = 20.0  # how firmly the prior holds: as many squared errors of a typical size
# An error is compared per decade of compute; a nearer budget than NEAREST decades counts as it.
NEAREST = 0.05
_ERROR, _ERRORS = 0.004, 1.0  # per decade: a typical error, and as how many observed ones it counts
_NEAR = 0.04  # the law reads runs this near to the lowest loss of their budget
_GOAL = Objective.of(1e-3, "log")
_FIRM = 1e3  # weight of the condition that weights sum to 1


@dataclass(frozen=True)
class Parts:
    """The three ways at one origin. law: None if the runs don't determine it; per: C / (N D)."""

    levels: Levels
    law: Fit | None
    per: float

    def at(self, budget: float) -> Array:
        """Return the log of the lowest loss of a budget by each part, (3,); NaN without a law."""
        x, y, target = self.levels.log_budgets, self.levels.smooth, float(np.log(budget))
        level = extrapolate(x, y, target)
        straight = y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (target - x[-1])
        law = np.nan
        if self.law is not None:
            n, d = laws.compute_optimal(self.law.form, self.law.vector, [budget], self.per)
            law = float(np.log(self.law.predict(parameters=n, tokens=d))[0])
        return np.array([level + self.levels.offset, straight + self.levels.offset, law])

    @property
    def noise(self) -> float:
        """Return the root mean square of the law's residuals, of log loss; NaN without a law."""
        return np.nan if self.law is None else float(np.sqrt(np.mean(self.law.residuals**2)))

    @property
    def prior(self) -> Array:
        """Return the weights before any error is known, (3,)."""
        if self.law is None:
            return np.append(PRIOR[:2] / PRIOR[:2].sum(), 0.0)
        share = 1 / (1 + (self.noise / EXACT) ** 4)
        return (1 - share) * PRIOR + share * np.array([0.0, 0, 1])


def parts_of(points: Points, budgets: Array, levels: Levels, per: float) -> Parts:
    """Return the parts of an origin's runs. budgets: the nominal budget of each run, (n,)."""
    near = points.take(near_best(points.loss, budgets, _NEAR))
    try:
        law = fit(laws.CHINCHILLA, Points(near.loss, near.parameters, near.tokens), _GOAL)
    except UserError:
        law = None
    return Parts(levels, law, per)


def weights(prior: Array, errors: Array, decades: Array) -> Array:
    """Return the weights of the parts, (m,). prior: (m,), 0 for a part that is absent; errors: of
    log loss of each part at budgets beyond earlier origins, (p, m), NaN where it was absent;
    decades: of compute from the origin to each, (p,).

    They minimise |A w|^2 + HELD |w - prior|^2, where A are the errors per decade over those of the
    best part: stacked regression (Breiman 1996), shrunk to a prior.
    """
    has = prior > 0
    known = np.isfinite(errors[:, has]).all(axis=1)
    A = errors[known][:, has] / np.maximum(decades[known], NEAREST)[:, None]
    squares = (_ERRORS * _ERROR**2 + np.square(A).sum(axis=0)) / (_ERRORS + len(A))
    A = A / np.sqrt(squares.min())
    held, m = np.sqrt(HELD), int(has.sum())
    left = np.vstack((A, held * np.eye(m), np.full((1, m), _FIRM)))
    right = np.concatenate((np.zeros(len(A)), held * prior[has], [_FIRM]))
    result = np.zeros(len(prior))
    result[has] = nnls(left, right)[0]
    return result / result.sum()
