"""Bootstrap: fits of resampled runs, thousands in one batch, each with its certificate.

    pairs          draw runs with replacement (Efron and Tibshirani 1993, section 9.5)
    clusters       draw trunks with all their branches: runs that share a trunk are not independent
    leave_one_out  leave out each run in turn: its influence on the fit
    interval       percentiles of the replicates, corrected for bias, skewness and few runs

All are weights on the same runs, so that batched solves suffice. At most four
million weights are in memory at once, so that memory doesn't grow with the square of the runs.
Invariant: a replicate that reached no minimum is kept and counted as uncertified, never dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri, stdtrit  # scipy.stats takes half a second to import

from forescale.ground.errors import UserError
from forescale.scaling.fitting.fit import Fit, starts
from forescale.scaling.fitting.laws import allocation
from forescale.scaling.fitting.newton import TOLERANCE, Solved, solve
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, curvatures, local
from forescale.scaling.fitting.points import Array

COUNT = 4000
_MINIMA = 3  # of the fit, that replicates start from
_WEIGHTS = 1 << 22  # runs times replicates that are in memory at once
_REFITS = 1000  # runs, or groups of them, that are left out by a refit each
# Scaled gradient at which a replicate is done: ten times less than is certified, and nothing beside
# the differences of draws.
_AIM = TOLERANCE / 10
_SMOOTH = 1e-3  # delta of Huber's function that stands for least absolute deviations in one step


@dataclass(frozen=True)
class Replicates:
    """R refits of a fit, and the group that each run was drawn with, (n,)."""

    fit: Fit
    solved: Solved
    groups: Array

    @cached_property
    def values(self) -> Array:
        """Return the published parameters, (R, p)."""
        return self.fit.form.published(self.solved.theta, self.fit.task.at.centre)

    @property
    def uncertified(self) -> int:
        """Return the number of replicates that reached no minimum."""
        return int((~self.solved.is_minimum).sum())

    @property
    def errors(self) -> dict[str, float]:
        """Return the standard deviation of each published parameter."""
        return dict(zip(self.fit.form.symbols, self.values.std(0, ddof=1).tolist(), strict=True))

    @cached_property
    def _drawn(self) -> Array:
        """Return the groups with a weight, (G,)."""
        return np.unique(self.groups[self.fit.weights > 0])

    @cached_property
    def without(self) -> Array:
        """Return the published parameters of the fits without one group, (G, p) at most. A group
        without which the others don't determine the parameters has no row. Of more than a thousand
        groups, each is left out by one Newton step."""
        if len(self._drawn) <= self.fit.form.size:
            return self.values[:0]
        if len(self._drawn) > _REFITS:
            return _without_by_a_step(self.fit, self.groups)[self._drawn]
        refits = leave_one_out(self.fit, self.groups, self._drawn)
        return refits.values[refits.solved.is_minimum]

    def allocation(self, level: float) -> tuple[float, Array] | None:
        """Return a of N* ~ C^a and its interval, (2,); None for a law whose N* is no power of C."""
        form = self.fit.form
        try:
            value = float(allocation(form, self.fit.vector))
        except UserError:
            return None
        return value, self.interval(level, lambda values: allocation(form, values))

    def interval(
        self,
        level: float = 0.95,
        of: Callable[[Array], Array] | None = None,
        method: Literal["corrected", "percentile"] = "corrected",
    ) -> Array:
        """Return the confidence interval of the parameters, (2, p), or of a function of them.

        of: a function from published parameters, (R, p), to (R, ...); the result is (2, ...).
        "percentile": as in most published tables. "corrected": percentiles shifted for bias and
        skewness (BCa: Efron and Tibshirani 1993, section 14.3), at the tails of Student's t, since
        percentiles are too narrow for few runs (Hesterberg 2015, arXiv 1411.5279). Measured on 30
        runs (tests/benchmarks/bench_recovery.py): nominal 90 % intervals of each parameter cover 88
        to 95 % corrected and 83 to 96 % by percentiles, depending on noise and objective.
        Raises UserError if `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise UserError("interval", f"the level is {level}", "give one between 0 and 1")
        function = of or (lambda values: values)
        draws = np.asarray(function(self.values))
        tails = np.array([1 - level, 1 + level]) / 2
        if method == "percentile":
            return np.quantile(draws, tails, axis=0)
        flat = draws.reshape(len(draws), -1)
        fitted = np.asarray(function(self.fit.vector[None])).reshape(1, -1)
        without = np.empty((0, flat.shape[1]))
        if len(self.without):
            without = np.asarray(function(self.without)).reshape(len(self.without), -1)
        G = len(self._drawn)
        tails = ndtr(np.sqrt(G / (G - 1)) * stdtrit(G - 1, tails))
        return corrected(flat, fitted, without, tails).reshape(2, *draws.shape[1:])


def corrected(draws: Array, fitted: Array, without: Array, tails: Array) -> Array:
    """Return the quantiles of the draws by BCa, (2, K). draws: (R, K); fitted: the fit, (1, K);
    without: (G, K), no rows to correct for bias alone."""
    # Draws equal to the fit, at an end of the range, don't show bias: half of them count as below.
    below = (draws < fitted).mean(0) + (draws == fitted).mean(0) / 2
    bias = ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    pull = without.sum(0) / max(1, len(without)) - without
    size = (pull**2).sum(0) ** 1.5
    skew = (pull**3).sum(0) / np.where(size > 0, 6 * size, 1.0)
    z = bias + ndtri(tails)[:, None]
    at = ndtr(bias + z / np.maximum(1 - skew * z, 1e-3))
    ends = [np.quantile(column, tail) for column, tail in zip(draws.T, at.T, strict=True)]
    return np.stack(ends, axis=-1)


def pairs(fit: Fit, count: int = COUNT, seed: int = 0) -> Replicates:
    """Return `count` refits, each of n runs drawn with replacement."""
    return clusters(fit, np.arange(len(fit.points)), count, seed)


def clusters(
    fit: Fit, groups: ArrayLike | Sequence[str], count: int = COUNT, seed: int = 0
) -> Replicates:
    """Return `count` refits, each of groups of runs drawn with replacement. groups: the trunk of
    each run, (n,). Raises UserError if there are fewer than two."""
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    if place.shape != (len(fit.points),) or len(names) < 2:
        problem = f"{len(place)} runs in {len(names)} groups, for a fit of {len(fit.points)} runs"
        raise UserError("groups", problem, "name the trunk of each run; there must be two or more")
    rng = np.random.default_rng(seed)
    parts = [
        replicates(fit, weights=counts(rng, len(names), part)[:, place])
        for part in _parts(fit, count)
    ]
    return _joined(parts, place)


def counts(rng: np.random.Generator, groups: int, count: int) -> Array:
    """Return how often each group is among as many drawn with replacement, (count, groups). They
    have numpy's multinomial distribution, in a sixth of its time."""
    drawn = rng.integers(groups, size=(count, groups)) + groups * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)


def _parts(fit: Fit, count: int) -> list[int]:
    """Return how many of `count` replicates are solved at a time."""
    size = max(1, _WEIGHTS // len(fit.points))
    return [min(size, count - i) for i in range(0, count, size)]


def _joined(parts: Sequence[Replicates], groups: Array | None = None) -> Replicates:
    """Return the replicates of all parts, in their order."""
    solved = Solved.join([part.solved for part in parts])
    return Replicates(parts[0].fit, solved, parts[0].groups if groups is None else groups)


def leave_one_out(
    fit: Fit, groups: Array | None = None, left_out: Array | None = None
) -> Replicates:
    """Return a refit without each of the groups `left_out`; by default, without each run. groups:
    that of each run, (n,)."""
    groups = np.arange(len(fit.points)) if groups is None else groups
    left_out = groups if left_out is None else left_out
    ends = np.cumsum(_parts(fit, len(left_out)))
    return _joined(
        [replicates(fit, weights=groups != part[:, None]) for part in np.split(left_out, ends[:-1])]
    )


def _without_by_a_step(fit: Fit, groups: Array) -> Array:
    """Return the published parameters after one Newton step without each group, (G, p). It is the
    infinitesimal jackknife (Efron and Tibshirani 1993, section 22.4), for theta: the error is of
    the second order in a group's share. groups: numbers from 0 to G - 1, (n,)."""
    task, theta = fit.task, fit.theta
    if task.goal.delta <= LEAST_ABSOLUTE.delta:
        task = replace(task, goal=replace(task.goal, delta=_SMOOTH))
    y, w = np.log(fit.points.loss)[None], fit.weights[None]
    here = local(task.form, task.at, y, w, theta, task.goal)
    hessian, _ = curvatures(task.form, task.at, w, theta, task.goal, here)
    pull = w * here.clipped * (1.0 if here.scale is None else here.scale)
    each = [np.bincount(groups, weights=row) for row in -here.jacobian[0] * pull]
    free = np.flatnonzero((theta[0] > task.low) & (theta[0] < task.high))
    moved = np.repeat(theta, len(each[0]), axis=0)
    inverse = np.linalg.pinv(hessian[0][np.ix_(free, free)], rcond=1e-13, hermitian=True)
    moved[:, free] += np.stack(each, axis=1)[:, free] @ inverse
    return task.form.published(np.clip(moved, task.low, task.high), task.at.centre)


def influence(fit: Fit) -> Array:
    """Return the influence of each run on the published parameters: the fit with it minus the fit
    without it, (n, p). Of more than a thousand runs, each is left out by one Newton step."""
    n = len(fit.points)
    without = _without_by_a_step(fit, np.arange(n)) if n > _REFITS else leave_one_out(fit).values
    return fit.vector - without


def replicates(fit: Fit, weights: ArrayLike) -> Replicates:
    """Return refits with weights, (R, n), that multiply the fit's. Each starts from the fit and
    from its other minima, and keeps the lowest minimum; a replicate that reaches none starts again
    from the profile grid. Raises UserError for weights of another shape."""
    n, w = len(fit.points), np.asarray(weights, dtype=float)
    if w.ndim != 2 or w.shape[1] != n:
        problem = f"the shape is {w.shape}, for a fit of {n} runs"
        raise UserError("weights", problem, f"give (replicates, {n})")
    w, y = w * fit.weights, np.log(fit.points.loss)[None]
    task = replace(fit.task, aim=_AIM)
    best = solve(task, y, w, fit.theta)
    for minimum in fit.certificate.minima[1:_MINIMA]:
        theta = fit.form.internal(fit.form.vector(minimum.values)[None], fit.task.at.centre)
        best = _lower(best, solve(task, y, w, theta))
    return Replicates(fit, _from_the_grid(fit, best, y, w), np.arange(n))


def _from_the_grid(fit: Fit, best: Solved, y: Array, w: Array) -> Solved:
    """Solve replicates without a minimum again, from the profile grid, all in one batch. A
    replicate with no more runs than parameters is left alone: many laws pass through its runs. y:
    log losses, (1, n); w: (R, n)."""
    enough = (w > 0).sum(1) > fit.form.size
    lost = np.flatnonzero(~best.is_minimum & enough)
    if not len(lost):
        return best
    grids = [starts(fit.task, y, w[r : r + 1]) for r in lost]
    owner = np.repeat(lost, [len(each) for each in grids])
    solved = solve(fit.task, y, w[owner], np.concatenate(grids))
    place = np.concatenate([np.arange(len(each)) for each in grids])
    for k in range(place.max() + 1):
        rows = np.flatnonzero(place == k)
        lower = _lower(best.take(owner[rows]), solved.take(rows))
        order = np.arange(len(best.value))
        order[owner[rows]] = len(order) + np.arange(len(rows))
        best = Solved.join([best, lower]).take(order)
    return best


def _lower(one: Solved, other: Solved) -> Solved:
    """Return the lower minimum of each row; a minimum is taken before a point that is none."""
    a, b = one.is_minimum, other.is_minimum
    take = (b & ~a) | ((b == a) & (other.value < one.value))
    rows = np.where(take, np.arange(len(a)) + len(a), np.arange(len(a)))
    return Solved.join([one, other]).take(rows)
