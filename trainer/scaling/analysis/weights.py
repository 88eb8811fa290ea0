"""Weights of runs in a fit: by their noise, and by their distance to the target.

    variance    of a run's log loss about the law: noise(C)^2 + (2 % per decade of C to target)^2
    weight      1 / variance, scaled to a mean of 1, so that the objective keeps its size
    noise       from repeats: runs of one N, D and recipe with other seeds, as a power of C

Invariant: noise is the scatter of one run when it is repeated. The standard error of a held-out
loss is not part of it: all runs are scored on the same windows, so that they share that error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

from forescale.scaling.fitting.points import Array, Points, spent
from forescale.scaling.forecasting.predictor import PRIOR
from forescale.scaling.records.records import RECIPE

NOISE = 0.003  # of log loss, without repeats; fits of public data are the same from 0.001 to 0.005
BELIEF = 3  # degrees of freedom of the prior NOISE
_STEADY = 1.0  # prior standard deviation of the slope of log variance per decade of C


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
class RunNoise:
    """The noise of a run as a power law of its compute.

    at: standard deviation of log loss of a run of `centre` FLOPs; slope: the exponent of C;
    freedom: degrees of freedom of the repeats that it was estimated from, 0 if it is assumed.
    """

    at: float = NOISE
    slope: float = 0.0
    centre: float = 1.0
    freedom: int = 0

    def __call__(self, flops: Array) -> Array:
        """Return the standard deviation of log loss of runs of these FLOPs."""
        return self.at * (flops / self.centre) ** self.slope


def noise_of_repeats(table: pd.DataFrame, points: Points) -> RunNoise:
    """Estimate the noise from the repeats in a table of records; points: of the same runs.

    The variances within repeats are scaled chi-squared. Their mean is a power of C, by maximum
    likelihood with a prior of NOISE (scaled inverse chi-squared; Gelman et al. 2013, section 2.6)
    and a prior of no slope. A table without seeds has no repeats: its runs may differ in something
    that it doesn't name, or one run may be listed twice.
    """
    seeds = [name for name in ("seed", "init_seed") if name in table]
    alike = [n for n in table if str(n).startswith("parameters") or n in ("tokens", *RECIPE)]
    if "tokens" not in alike:
        return RunNoise()
    known = table.assign(flops_of=spent(points), log_loss=np.log(table["loss"]))
    groups = (
        known.drop_duplicates([*alike, *seeds])
        .groupby(alike, dropna=False)
        .agg(cost=("flops_of", "mean"), variance=("log_loss", "var"), runs=("log_loss", "size"))
    )
    groups = groups[groups["runs"] > 1]
    if groups.empty:
        return RunNoise()
    cost, variance = (groups[name].to_numpy(float) for name in ("cost", "variance"))
    freedom = groups["runs"].to_numpy() - 1
    x = np.log10(cost)
    middle = float(np.average(x, weights=freedom))
    x = x - middle

    def negative_log_posterior(theta: Array) -> float:
        log = theta[0] + theta[1] * x
        likelihood = freedom * (log + variance * np.exp(-log))
        prior = BELIEF * (theta[0] + NOISE**2 * np.exp(-theta[0])) + (theta[1] / _STEADY) ** 2
        return float(likelihood.sum() + prior) / 2

    log, slope = optimize.minimize(negative_log_posterior, [2 * np.log(NOISE), 0.0]).x
    power = float(slope) / 2 / np.log(10)  # of a standard deviation, by log C
    return RunNoise(float(np.exp(log / 2)), power, 10**middle, int(freedom.sum()))


def weigh(flops: Array, noise: RunNoise | None, target: float | None) -> Array:
    """Return weights of runs, (n,), with a mean of 1.

    noise: None gives all runs the same noise, NOISE; target: FLOPs of the run that the law is
    fitted for, None leaves out the distance.
    """
    deviation = (noise or RunNoise())(flops)
    away = 0.0 if target is None else PRIOR * np.log10(target / flops)
    weight = 1 / (deviation**2 + away**2)
    return weight / weight.mean()


def effective(weights: Sequence[float] | Array) -> float:
    """Return the number of equally weighted runs with the same information (Kish 1965, 11.7)."""
    w = np.asarray(weights, dtype=float)
    return float(w.sum() ** 2 / np.square(w).sum())
