"""What predicts larger runs: the protocol of all methods, their distributions, the simple methods.

    Predictor   knows the runs of some budgets; gives distributions of the loss, or of a metric, of
                a later budget
    line        straight in log C and log loss, through the lowest loss of the last two budgets
    L(C)        a law of three parameters through the lowest loss of every budget
    last minimum    the lowest loss of the last budget

Invariant: a predictor reads nothing beyond the budgets that it knows, and neither do its intervals.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import stdtrit

from forescale.ground.errors import UserError
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.points import Array, Points

COMBINED, LAW, LINE, FRONTIER, LAST = "combined", "law", "line", "L(C)", "last minimum"
PRIOR = 0.02  # standard deviation of log loss per decade of compute
BELIEF = 3  # the prior counts as this many origins; with fewer origins the result is "prior only"
LEAST = 3  # budgets of an origin: those that a method knows, at least
# Distances of forecasts: the compute of what is predicted over the last known budget, from one of
# these factors to the next.
BANDS = (1.0, 2.5, 5.0, 12.0, 40.0, 150.0, np.inf)
INNER, OUTER = 0.5, 0.9  # levels of the intervals of backtests
# Columns of errors that a distribution gives: see Distribution.against.
ERRORS = ("predicted", "error", "inside_50", "inside_90", "width", "interval_score")


def band_of(factor: float) -> int:
    """Return the place in BANDS of the band with this factor of compute."""
    return max(0, int(np.searchsorted(BANDS, factor)) - 1)


def band_name(band: int) -> str:
    """Return a band in words."""
    low, high = BANDS[band : band + 2]
    return f"{low:g} to {high:g} times" if np.isfinite(high) else f"over {low:g} times"


class Distribution(Protocol):
    """The distributions of m runs: of their loss, or of a task's metric."""

    def against(self, observed: Array) -> dict[str, Array]:
        """Compare with what was observed, (m,); return columns of (m,).

        predicted: the median; error: predicted minus observed, of a loss in logs; inside_50,
        inside_90: 1 inside of these intervals, else 0; width, interval_score: of the 90 % interval
        (Gneiting and Raftery 2007, eq. 43; lower is better). NaN without intervals.
        """


class Predictor(Protocol):
    """A method that knows the runs of an origin."""

    def minimum(self, budget: float) -> Distribution | None:
        """Return the distribution of the lowest loss of a budget, (1,); None if it has none."""

    def of_runs(
        self, columns: Mapping[str, Array], flops: Array, budget: float
    ) -> Distribution | None:
        """Return the distributions of runs of a budget, (m,), or None. columns: N, D and what else
        is known of the runs; flops: their C; (m,) each."""


@dataclass(frozen=True)
class Predicted:
    """Predicted log losses, (m,), each with Student's t about it. deviation: the scale of t, (m,);
    freedom: its degrees of freedom, one number or (m,)."""

    log_loss: Array
    deviation: Array
    freedom: Array | float

    @property
    def loss(self) -> Array:
        """Return the median loss, (m,)."""
        return np.exp(self.log_loss)

    def half(self, level: float) -> Array:
        """Return half of the width of the interval of log loss, (m,)."""
        return stdtrit(self.freedom, (1 + level) / 2) * self.deviation

    def interval(self, level: float) -> Array:
        """Return the low and high ends of the interval of the loss, (2, m)."""
        half = self.half(level)
        return np.exp(np.stack((self.log_loss - half, self.log_loss + half)))

    def against(self, observed: Array) -> dict[str, Array]:
        error = np.atleast_1d(self.log_loss - np.log(observed))
        inner, outer = self.half(INNER), self.half(OUTER)
        score = 2 * outer + 2 / (1 - OUTER) * np.maximum(np.abs(error) - outer, 0)
        inside = [(np.abs(error) <= half).astype(float) for half in (inner, outer)]
        values = np.atleast_1d(self.loss), error, *inside, np.atleast_1d(2 * outer), score
        return dict(zip(ERRORS, values, strict=True))


@dataclass(frozen=True)
class Discrepancy:
    """The error of a method itself beyond its runs. per_decade: standard deviation of log loss per
    decade of compute; origins: number observed."""

    per_decade: float = PRIOR
    origins: int = 0

    @property
    def is_prior(self) -> bool:
        """Return True if the prior counts more than the observed origins."""
        return self.origins < BELIEF

    def after(self, errors: Sequence[float]) -> "Discrepancy":
        """Return the discrepancy after origins with these errors per decade. It is the root of the
        mean of the squares, the prior's included: the estimate of a variance with a scaled inverse
        chi-squared prior (Gelman et al. 2013, section 2.6)."""
        squares = BELIEF * PRIOR**2 + float(np.square(errors).sum())
        return Discrepancy(float(np.sqrt(squares / (BELIEF + len(errors)))), len(errors))


@dataclass(frozen=True)
class SimplePredictor:
    """A simple method: the lowest loss as a function of C alone. last: the last known budget;
    discrepancy: by the errors of the same method at earlier origins."""

    loss: Callable[[float], float]
    last: float
    discrepancy: Discrepancy

    def minimum(self, budget: float) -> Predicted:
        deviation = self.discrepancy.per_decade * np.log10([budget / self.last])
        return Predicted(np.log([self.loss(budget)]), deviation, BELIEF + self.discrepancy.origins)

    def of_runs(self, columns: Mapping[str, Array], flops: Array, budget: float) -> None:
        """Return None: N and D are unknown to it."""


def simple_losses(flops: Array, lowest: Array) -> dict[str, Callable[[float], float]]:
    """Return the simple methods by name: functions from a budget's C to its lowest loss. flops,
    lowest: C and the lowest loss of each budget, ascending, (B,). A method for which there are too
    few budgets is absent."""
    last, methods = float(lowest[-1]), dict[str, Callable[[float], float]]()
    if len(flops) >= 2:
        x, y = np.log(flops[-2:]), np.log(lowest[-2:])
        slope = (y[1] - y[0]) / (x[1] - x[0])
        methods[LINE] = lambda c: float(np.exp(y[1] + slope * (np.log(c) - x[1])))
    if len(flops) >= laws.FRONTIER.size:
        try:
            law = fit(laws.FRONTIER, Points(lowest, flops=flops))
            methods[FRONTIER] = lambda c: float(law.predict(flops=c)[0])
        except UserError:
            pass  # these runs don't determine the law
    return methods | {LAST: lambda c: last}


def simple_predictors(points: Points, budgets: Array) -> Iterator[tuple[int, str, SimplePredictor]]:
    """Yield the number of known budgets, the name and the simple predictor of every origin.
    budgets: the nominal budget of each run, (n,)."""
    distinct = np.unique(budgets)
    lowest = np.array([points.loss[budgets == c].min() for c in distinct])
    earlier: dict[str, list[tuple[int, Callable[[float], float]]]] = {}
    for k in range(LEAST - 1, len(distinct)):
        for name, loss in simple_losses(distinct[:k], lowest[:k]).items():
            before = earlier.setdefault(name, [])
            errors = [
                abs(np.log(old(distinct[j]) / lowest[j])) / np.log10(distinct[j] / distinct[i - 1])
                for i, old in before
                for j in range(i, k)
            ]
            before.append((k, loss))
            if k >= LEAST:
                yield k, name, SimplePredictor(loss, distinct[k - 1], Discrepancy().after(errors))
