"""Backtests of a law: fit the cheap budgets, predict the expensive ones; and calibrated intervals.

    origin k     budgets 1..k -> fit -> each run of budgets k+1.. -> error, inside the interval?
    discrepancy  the law's own error in log loss per decade of compute beyond its runs: a prior of
                 2 %, updated by the origins so far
    interval     noise of the fit (resampling), noise of a run (residuals), discrepancy, and a share
                 of what the run loses off the optimum beyond that of fitted runs; Student's t

Invariant: an origin is one observation, however many runs it predicts. An interval is tested only
on runs that were unknown when it was made: origin k is calibrated by the errors that the origins
before it made at budgets up to k.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from forescale.ground.errors import UserError
from forescale.scaling.fitting import bootstrap, laws
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, spent
from forescale.scaling.forecasting.predictor import BELIEF, LEAST, Discrepancy, Predicted

EXCESS = 0.2  # of what a run loses off the optimum beyond that of fitted runs, as forecaster.py has


@dataclass(frozen=True)
class CalibratedLaw:
    """A fitted law with all that is known of its errors. noise: standard deviation of log loss of
    one run; greatest: C of the most expensive run of the fit."""

    fit: Fit
    replicates: bootstrap.Replicates
    noise: float
    greatest: float
    discrepancy: Discrepancy

    def minimum(self, budget: float) -> Predicted:
        """Return the prediction of the best N and D of a budget; see Predictor."""
        law, flops = self.fit, np.array([budget])
        if law.form.columns == ("flops",):
            return self.predicted({"flops": flops}, flops)
        n, d = laws.compute_optimal(law.form, law.vector, flops, law.points.per_token)
        return self.predicted({"parameters": n, "tokens": d}, flops)

    def of_runs(self, columns: Mapping[str, Array], flops: Array, budget: float) -> Predicted:
        return self.predicted({c: columns[c] for c in self.fit.form.columns}, flops)

    def predicted(
        self, columns: dict[str, Array], flops: Array, resampled: Array | None = None
    ) -> Predicted:
        """Return the predicted log loss of m runs. columns: what the law reads, (m,) each; flops: C
        of each run, (m,); resampled: what `resampled` gives for these columns, if it is known."""
        resampled = self.resampled(columns) if resampled is None else resampled
        # Resampled fits scatter around the fit with long tails; half their middle 68 % is robust.
        low, high = np.percentile(resampled, [15.87, 84.13], axis=0)
        decades = np.maximum(0.0, np.log10(flops / self.greatest))
        variance = ((high - low) / 2) ** 2 + self.noise**2
        variance += (self.discrepancy.per_decade * decades) ** 2
        known = self._excess(self.fit.points.columns(self.fit.form.columns)).max()
        further = np.maximum(0.0, self._excess(columns) - known)
        variance += (EXCESS * further) ** 2
        freedom = BELIEF + self.discrepancy.origins
        return Predicted(np.log(self.fit.predict(**columns)), np.sqrt(variance), freedom)

    def resampled(self, columns: dict[str, Array]) -> Array:
        """Return the log losses of m runs by the resampled fits, (R, m)."""
        return np.log(self.fit.form.predict(self.replicates.values, **columns))

    def _excess(self, columns: Mapping[str, Array]) -> Array:
        """Log loss of m runs above that of the best N and D of the same N D, (m,), by the law; 0
        for a law that has no such optimum."""
        form, vector = self.fit.form, self.fit.vector
        if form.columns != ("parameters", "tokens"):
            return np.zeros(len(next(iter(columns.values()))))
        both = columns["parameters"] * columns["tokens"]
        n, d = laws.compute_optimal(form, vector, both, 1.0)
        return np.log(self.fit.predict(**columns) / self.fit.predict(parameters=n, tokens=d))

    def errors(self, later: Points) -> tuple[Array, Array]:
        """Return the log of predicted over observed loss, and the extrapolation factors, (m,)."""
        columns = later.columns(self.fit.form.columns)
        errors = np.log(self.fit.predict(**columns)) - np.log(later.loss)
        return errors, spent(later) / self.greatest


def fit_calibrated(
    form: Form, points: Points, goal: Objective, count: int, seed: int, discrepancy: Discrepancy
) -> CalibratedLaw:
    """Fit a law, resample it by pairs `count` times and calibrate it. Raises UserError if the runs
    don't determine the law."""
    law = fit(form, points, goal)
    return calibrate(law, bootstrap.pairs(law, count, seed), discrepancy)


def calibrate(
    law: Fit, replicates: bootstrap.Replicates, discrepancy: Discrepancy
) -> CalibratedLaw:
    """Return the calibrated law of a fit that is resampled already."""
    points, rest = law.points, law.residuals - np.median(law.residuals)
    # The fit follows its runs, so that residuals are smaller than the noise by this share.
    free = max(1, len(points) - law.form.size) / len(points)
    noise = 1.4826 * float(np.median(np.abs(rest))) / np.sqrt(free)
    return CalibratedLaw(law, replicates, noise, float(np.max(spent(points))), discrepancy)


@dataclass(frozen=True)
class Backtest:
    """The result of one origin, whose later runs are (m,).

    budgets, runs: numbers of them in the fit; factors: extrapolation factors, the compute of each
    later run over the greatest of the fit; errors: log of predicted over observed loss; noise: see
    CalibratedLaw; inside_resampled, inside_calibrated: True where the observed loss was inside the
    interval of the resampled fits alone, and inside the calibrated one.
    """

    budgets: int
    runs: int
    factors: Array
    errors: Array
    noise: float
    inside_resampled: Array
    inside_calibrated: Array

    @property
    def per_decade(self) -> float:
        """Return the error per decade of compute, without the noise of a run."""
        return _per_decade(self.errors, self.factors, self.noise)


def _per_decade(errors: Array, factors: Array, noise: float) -> float:
    """Return one ratio over all runs: those at small factors show little but noise, and have little
    weight."""
    excess = np.maximum(0.0, errors**2 - noise**2)
    return float(np.sqrt(excess.sum() / np.square(np.log10(factors)).sum()))


def backtests(
    form: Form, points: Points, budgets: Array, goal: Objective, level: float, count: int = 200
) -> list[Backtest]:
    """Return a backtest for every origin whose runs determine the law, the cheapest first. budgets:
    the nominal budget of each run, (n,)."""
    distinct, results = np.unique(budgets), list[Backtest]()
    for k, law in laws_of_origins(form, points, budgets, goal, count):
        later = points.take(budgets > distinct[k - 1])
        columns, y = later.columns(law.fit.form.columns), later.log("loss")
        resampled = law.resampled(columns)
        low, high = law.predicted(columns, spent(later), resampled).interval(level)
        least, most = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
        errors, factors = law.errors(later)
        inside = (least <= y) & (y <= most), (low <= later.loss) & (later.loss <= high)
        results.append(Backtest(k, len(law.fit.points), factors, errors, law.noise, *inside))
    return results


def laws_of_origins(
    form: Form, points: Points, budgets: Array, goal: Objective, count: int = 200
) -> Iterator[tuple[int, CalibratedLaw]]:
    """Yield the number of budgets and the law of every origin whose runs determine it. A law knows
    nothing beyond its origin: those before it count by their errors up to there."""
    distinct, earlier = np.unique(budgets), list[tuple[float, CalibratedLaw]]()
    for k in range(LEAST, len(distinct)):
        known = budgets <= distinct[k - 1]
        later = [points.take(known & (budgets > last)) for last, _ in earlier]
        errors = [
            _per_decade(*law.errors(runs), law.noise)
            for runs, (_, law) in zip(later, earlier, strict=True)
        ]
        before = Discrepancy().after(errors)
        try:
            law = fit_calibrated(form, points.take(known), goal, count, k, before)
        except UserError:
            continue  # the runs don't determine the law, so this is no origin
        earlier.append((float(distinct[k - 1]), law))
        yield k, law
