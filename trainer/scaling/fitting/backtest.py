"""How far a law is off beyond its runs: it is fitted to the cheaper budgets and meets the dearer.

    origin k     budgets 1..k -> fit -> each run of the budgets k+1.. -> error, inside the interval?
    discrepancy  the law's own error in log loss, a decade of compute beyond its runs: a prior of
                 2 %, updated by the origins so far
    interval     noise of the fit (resampled), noise of a run (residuals), discrepancy; Student's t

Invariant: an origin is one observation, however many runs it foretells; and what an interval is
judged by was not known when it was made: origin k is calibrated by the origins before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from forescale.errors import UserError
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points

PRIOR = 0.02  # of log loss a decade of compute
BELIEF = 3  # origins that the prior counts for; fewer seen than that are "prior only"
_LEAST = 3  # budgets that a law is fitted to


@dataclass(frozen=True)
class Discrepancy:
    """a_decade: standard deviation of log loss; origins: seen."""

    a_decade: float = PRIOR
    origins: int = 0

    @property
    def is_prior(self) -> bool:
        return self.origins < BELIEF

    def after(self, seen: Sequence[float]) -> "Discrepancy":
        """With what each origin was off by, a decade: the mean of the squares, the prior's included
        (of a variance with a scaled inverse chi-squared prior; Gelman et al. 2013, section 2.6)."""
        squares = BELIEF * PRIOR**2 + float(np.square(seen).sum())
        return Discrepancy(float(np.sqrt(squares / (BELIEF + len(seen)))), len(seen))


@dataclass(frozen=True)
class Sure:
    """The law with its uncertainty. noise: of a run, standard deviation of log loss; greatest: C of
    the dearest run that it was fitted to."""

    fit: Fit
    replicates: bootstrap.Replicates
    noise: float
    greatest: float
    discrepancy: Discrepancy

    def interval(
        self, columns: dict[str, Array], flops: Array, level: float
    ) -> tuple[Array, Array]:
        """(m,) low and high of the loss of m runs, of compute `flops`."""
        form = self.fit.form
        resampled = np.log(form.predict(self.replicates.values, **columns))  # (R, m)
        fitted = np.log(self.fit.predict(**columns))
        # Resampled fits scatter around the fit with long tails; half their middle 68 % is robust.
        low, high = np.percentile(resampled, [15.87, 84.13], axis=0)
        decades = np.maximum(0.0, np.log10(flops / self.greatest))
        variance = ((high - low) / 2) ** 2 + self.noise**2
        variance += (self.discrepancy.a_decade * decades) ** 2
        t = stats.t.ppf((1 + level) / 2, BELIEF + self.discrepancy.origins)
        half = t * np.sqrt(variance)
        return np.exp(fitted - half), np.exp(fitted + half)


def sure(
    form: Form, points: Points, goal: Objective, count: int, seed: int, discrepancy: Discrepancy
) -> Sure:
    """Fit, and resample in pairs. Raises UserError where the runs can't tell the law."""
    made = fit(form, points, goal)
    return sure_of(made, bootstrap.pairs(made, count, seed), discrepancy)


def sure_of(made: Fit, replicates: bootstrap.Replicates, discrepancy: Discrepancy) -> Sure:
    """Of a fit that is resampled already."""
    points, rest = made.points, made.residuals - np.median(made.residuals)
    # The law has bent itself to its runs.
    free = max(1, len(points) - made.form.size) / len(points)
    noise = 1.4826 * float(np.median(np.abs(rest))) / np.sqrt(free)
    return Sure(made, replicates, noise, float(np.max(spent(points))), discrepancy)


def spent(points: Points) -> Array:
    """C of each run: as counted, or 6 N D."""
    if points.flops is not None:
        return points.flops
    return 6 * np.exp(points.log("parameters") + points.log("tokens"))


@dataclass(frozen=True)
class RollOut:
    """One origin. budgets, runs: that it was fitted to; factors: of each later run's compute to the
    dearest of those; errors: log of foretold over observed; noise: of a run, see Sure; bare,
    calibrated: whether the observed was inside of the resampled fits' interval, and of the
    calibrated one."""

    budgets: int
    runs: int
    factors: Array
    errors: Array
    noise: float
    bare: Array
    calibrated: Array

    @property
    def a_decade(self) -> float:
        """What it was off by, a decade, beyond the noise of a run. As one ratio over the later
        runs: those nearby tell of little but noise, and weigh little."""
        beyond = np.maximum(0.0, self.errors**2 - self.noise**2)
        return float(np.sqrt(beyond.sum() / np.square(np.log10(self.factors)).sum()))


def roll_outs(
    form: Form, points: Points, budgets: Array, goal: Objective, level: float, count: int = 200
) -> list[RollOut]:
    """Every origin whose runs can tell the law, the cheapest first. budgets: (n,), nominal."""
    found: list[RollOut] = []
    distinct = np.unique(budgets)
    for k in range(_LEAST, len(distinct)):
        known, later = budgets <= distinct[k - 1], budgets > distinct[k - 1]
        before = Discrepancy().after([r.a_decade for r in found])
        try:
            law = sure(form, points.take(known), goal, count, k, before)
        except UserError:
            continue  # too few to tell the law: no origin
        found.append(_meet(law, k, points.take(later), level))
    return found


def _meet(law: Sure, budgets: int, later: Points, level: float) -> RollOut:
    form, flops = law.fit.form, spent(later)
    columns = {c: np.exp(later.log(c)) for c in form.columns}
    low, high = law.interval(columns, flops, level)

    def losses(values: Array) -> Array:
        return form.predict(values, **columns)

    bare = law.replicates.interval(level, losses)
    return RollOut(
        budgets,
        len(law.fit.points),
        flops / law.greatest,
        np.log(law.fit.predict(**columns)) - np.log(later.loss),
        law.noise,
        (bare[0] <= later.loss) & (later.loss <= bare[1]),
        (low <= later.loss) & (later.loss <= high),
    )
