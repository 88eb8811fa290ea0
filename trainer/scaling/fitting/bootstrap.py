"""How sure a fit is: the same fit of resampled runs, thousands at once, each with its certificate.

    pairs        runs are drawn with replacement (Efron and Tibshirani 1993, section 9.5)
    clusters     trunks are drawn with all their branches: runs that share one are not independent
    residuals    N and D stay, residuals of log loss are drawn (Efron and Tibshirani, section 9.4)
    leave one out: what each run does to the fit
    interval     of what was drawn: percentiles, corrected for bias, skewness and few runs

All but the third are weights on the same runs, so that one batched solve does them.
Invariant: a replicate that missed its minimum is counted as uncertified and kept, never dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from forescale.errors import UserError
from forescale.scaling.fitting.fit import Fit, polish, starts
from forescale.scaling.fitting.newton import TOLERANCE, Solved, join
from forescale.scaling.fitting.points import Array

COUNT = 4000
_BASINS = 3


@dataclass(frozen=True)
class Replicates:
    """R fits. values: published parameters (R, p); objective, gradient (scaled), curvature: (R,);
    edge: (R, p), see newton.Solved; groups: (n,), what was drawn as one, each run by default."""

    fit: Fit
    values: Array
    objective: Array
    gradient: Array
    curvature: Array
    edge: Array
    groups: Array | None = None

    @property
    def certified(self) -> Array:
        """(R,) of bool."""
        return (self.gradient <= TOLERANCE) & (self.curvature > 0)

    @property
    def uncertified(self) -> int:
        return int((~self.certified).sum())

    @property
    def errors(self) -> dict[str, float]:
        """The standard deviation of each published parameter."""
        return dict(zip(self.fit.form.symbols, self.values.std(0, ddof=1).tolist(), strict=True))

    @cached_property
    def _drawn(self) -> Array:
        """Whether a run belongs to a group, (G, n): of those that have weight."""
        groups = np.arange(len(self.fit.points)) if self.groups is None else self.groups
        return groups == np.unique(groups[self.fit.weights > 0])[:, None]

    @cached_property
    def without(self) -> Array:
        """Published parameters of the fit without a group, a row for each that leaves enough to
        tell them: (G, p) at most."""
        if len(self._drawn) <= self.fit.form.size:
            return self.values[:0]
        found = replicates(self.fit, weights=~self._drawn)
        return found.values[found.certified]

    def interval(
        self,
        level: float = 0.95,
        of: Callable[[Array], Array] | None = None,
        method: Literal["corrected", "percentile"] = "corrected",
    ) -> Array:
        """(2, ...), of a function of published parameters that takes (R, p) and gives (R, ...);
        without one, of the parameters, (2, p).

        "percentile": as most published tables have it. "corrected": percentiles moved for bias and
        skewness (BCa: Efron and Tibshirani 1993, section 14.3), of tails that are those of
        Student's t, where percentiles are too narrow for few runs (Hesterberg 2015, arXiv
        1411.5279). Measured, of 30 runs (tests/benchmarks/bench_recovery.py): nominal 90 % of each
        parameter cover 88 to 95 % corrected, 83 to 96 % by percentiles, as noise and objective go.
        """
        if not 0 < level < 1:
            raise UserError("interval", f"its level is {level}", "give one between 0 and 1")
        function = of or (lambda values: values)
        found = np.asarray(function(self.values))
        tails = np.array([1 - level, 1 + level]) / 2
        if method == "percentile":
            return np.quantile(found, tails, axis=0)
        flat, shape = found.reshape(len(found), -1), found.shape[1:]
        made = np.asarray(function(self.fit.vector[None])).reshape(1, -1)
        without = np.empty((0, flat.shape[1]))
        if len(self.without):
            without = np.asarray(function(self.without)).reshape(len(self.without), -1)
        G = len(self._drawn)
        tails = norm.cdf(np.sqrt(G / (G - 1)) * t.ppf(tails, G - 1))
        return _quantiles(flat, _accelerated(flat, made, without, tails)).reshape(2, *shape)


def _accelerated(found: Array, made: Array, without: Array, tails: Array) -> Array:
    """The probabilities (2, K) at which BCa reads the draws. found: (R, K); made: (1, K); without:
    (G, K), none to correct for bias alone."""
    # Draws that are the fit itself, at an edge, are no sign of bias: half of them count as below.
    below = (found < made).mean(0) + (found == made).mean(0) / 2
    bias = norm.ppf(np.clip(below, 0.5 / len(found), 1 - 0.5 / len(found)))
    pull = without.sum(0) / max(1, len(without)) - without
    size = (pull**2).sum(0) ** 1.5
    skew = (pull**3).sum(0) / np.where(size > 0, 6 * size, 1.0)
    z = bias + norm.ppf(tails)[:, None]
    return norm.cdf(bias + z / np.maximum(1 - skew * z, 1e-3))


def _quantiles(found: Array, at: Array) -> Array:
    """(2, K) of (R, K), each column at its own probabilities (2, K)."""
    columns = zip(found.T, at.T, strict=True)
    return np.stack([np.quantile(column, own) for column, own in columns], axis=-1)


def pairs(fit: Fit, count: int = COUNT, seed: int = 0) -> Replicates:
    return clusters(fit, np.arange(len(fit.points)), count, seed)


def clusters(
    fit: Fit, groups: ArrayLike | Sequence[str], count: int = COUNT, seed: int = 0
) -> Replicates:
    """groups: (n,), the trunk of each run. Raises UserError where all share one."""
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    if place.shape != (len(fit.points),) or len(names) < 2:
        what = f"{len(place)} runs in {len(names)} groups, for a fit of {len(fit.points)} runs"
        raise UserError("groups", what, "name the trunk of each run; there must be two or more")
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
    return replace(replicates(fit, weights=drawn[:, place]), groups=place)


def residuals(fit: Fit, count: int = COUNT, seed: int = 0) -> Replicates:
    """Residuals are drawn from the runs that have weight, centred, and as large as they would be
    had the law not bent itself to its runs (Davison and Hinkley 1997, section 6.2.3, with the mean
    leverage p / n)."""
    kept = fit.residuals[fit.weights > 0]
    kept = (kept - kept.mean()) / np.sqrt(max(1, len(kept) - fit.form.size) / len(kept))
    drawn = np.random.default_rng(seed).integers(len(kept), size=(count, len(fit.points)))
    fitted = np.log(fit.points.loss) - fit.residuals
    return replicates(fit, losses=np.exp(fitted + kept[drawn]))


def leave_one_out(fit: Fit) -> Replicates:
    """Replicate i is the fit without run i, (n, p)."""
    return replicates(fit, weights=1 - np.eye(len(fit.points)))


def influence(fit: Fit, of: Callable[[Array], Array] | None = None) -> Array:
    """What each run adds to the published parameters, or to a function of them as in `interval`:
    (n, ...), the fit with it minus the fit without it."""
    function = of or (lambda values: values)
    return np.asarray(function(fit.vector[None])) - np.asarray(function(leave_one_out(fit).values))


def replicates(
    fit: Fit, weights: ArrayLike | None = None, losses: ArrayLike | None = None
) -> Replicates:
    """Refits with weights (R, n), on top of the fit's own, or with other losses (R, n), or both.
    Each starts from the fit and from its other basins, and keeps the lowest minimum; one that finds
    none starts again from the profile grid. Raises UserError for other shapes."""
    n = len(fit.points)
    w = np.ones((1, n)) if weights is None else np.asarray(weights, dtype=float)
    y = np.asarray(fit.points.loss)[None] if losses is None else np.asarray(losses, dtype=float)
    for name, given in (("weights", w), ("losses", y)):
        if given.ndim != 2 or given.shape[1] != n:
            what = f"their shape is {given.shape}, for a fit of {n} runs"
            raise UserError(name, what, f"give (replicates, {n})")
    w, y = w * fit.weights, np.log(y)
    R = max(len(w), len(y))
    w, y = np.broadcast_to(w, (R, n)), (y if len(y) == 1 else np.broadcast_to(y, (R, n)))
    best = polish(fit.task, y, w, fit.theta)
    for basin in fit.certificate.basins[1:_BASINS]:
        theta = fit.form.internal(fit.form.vector(basin.values)[None], fit.task.at.centre)
        best = _lower(best, polish(fit.task, y, w, theta))
    best = _from_the_grid(fit, best, y, w)
    values = fit.form.published(best.theta, fit.task.at.centre)
    return Replicates(fit, values, best.value, best.gradient, best.curvature, best.edge)


def _from_the_grid(fit: Fit, best: Solved, y: Array, w: Array) -> Solved:
    """Those without a minimum again, from the starts of the profile grid, in one solve. Not where
    so few runs are left that many laws go through them."""
    enough = (w > 0).sum(1) > fit.form.size
    lost = np.flatnonzero(~_passed(best) & enough)
    if not len(lost):
        return best
    own = [starts(fit.task, y[:1] if len(y) == 1 else y[r : r + 1], w[r : r + 1]) for r in lost]
    owner = np.repeat(lost, [len(each) for each in own])
    found = polish(fit.task, y if len(y) == 1 else y[owner], w[owner], np.concatenate(own))
    place = np.concatenate([np.arange(len(each)) for each in own])
    for k in range(place.max() + 1):
        rows = np.flatnonzero(place == k)
        lower = _lower(best.take(owner[rows]), found.take(rows))
        order = np.arange(len(best.value))
        order[owner[rows]] = len(order) + np.arange(len(rows))
        best = join([best, lower]).take(order)
    return best


def _passed(found: Solved) -> Array:
    return (found.gradient <= TOLERANCE) & (found.curvature > 0)


def _lower(one: Solved, other: Solved) -> Solved:
    """Row by row: the lower minimum; a minimum before what is none."""
    a, b = _passed(one), _passed(other)
    take = (b & ~a) | ((b == a) & (other.value < one.value))
    rows = np.where(take, np.arange(len(a)) + len(a), np.arange(len(a)))
    return join([one, other]).take(rows)
