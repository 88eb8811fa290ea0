"""How sure a fit is: the same fit of resampled runs, thousands at once, each with its certificate.

    pairs        runs are drawn with replacement (Efron and Tibshirani 1993, section 9.5)
    clusters     trunks are drawn with all their branches: runs that share one are not independent
    residuals    N and D stay, residuals of log loss are drawn (Efron and Tibshirani, section 9.4)
    leave one out: what each run does to the fit

All but the third are weights on the same runs, so that one batched solve does them.
Invariant: a replicate that missed its minimum is counted as uncertified and kept, never dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trainer.errors import UserError
from trainer.scaling.fit import Fit, polish, starts
from trainer.scaling.newton import TOLERANCE, Solved, join
from trainer.scaling.points import Array

COUNT = 4000
_BASINS = 3


@dataclass(frozen=True)
class Replicates:
    """R fits. values: published parameters (R, p); objective, gradient (scaled), curvature: (R,);
    edge: (R, p), see newton.Solved."""

    fit: Fit
    values: Array
    objective: Array
    gradient: Array
    curvature: Array
    edge: Array

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

    def interval(self, level: float = 0.95, of: Callable[[Array], Array] | None = None) -> Array:
        """The percentile interval, (2, ...), of a function of published parameters that takes
        (R, p) and gives (R, ...); without one, of the parameters, (2, p)."""
        if not 0 < level < 1:
            raise UserError("interval", f"its level is {level}", "give one between 0 and 1")
        found = self.values if of is None else np.asarray(of(self.values))
        tail = 50 * (1 - level)
        return np.percentile(found, [tail, 100 - tail], axis=0)


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
    return replicates(fit, weights=drawn[:, place])


def residuals(fit: Fit, count: int = COUNT, seed: int = 0) -> Replicates:
    """Residuals are centred, and drawn from the runs that have weight."""
    kept = fit.residuals[fit.weights > 0]
    kept = kept - kept.mean()
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
    for r in np.flatnonzero(~_passed(best)).tolist():
        own = (y[:1] if len(y) == 1 else y[r : r + 1]), w[r : r + 1]
        if (own[1] > 0).sum() < 2:
            continue
        for again in _each(polish(fit.task, *own, starts(fit.task, *own))):
            one = _lower(best.take(np.array([r])), again)
            best = join([best.take(np.arange(r)), one, best.take(np.arange(r + 1, R))])
    values = fit.form.published(best.theta, fit.task.at.centre)
    return Replicates(fit, values, best.value, best.gradient, best.curvature, best.edge)


def _passed(found: Solved) -> Array:
    return (found.gradient <= TOLERANCE) & (found.curvature > 0)


def _lower(one: Solved, other: Solved) -> Solved:
    """Row by row: the lower minimum; a minimum before what is none."""
    a, b = _passed(one), _passed(other)
    take = (b & ~a) | ((b == a) & (other.value < one.value))
    rows = np.where(take, np.arange(len(a)) + len(a), np.arange(len(a)))
    return join([one, other]).take(rows)


def _each(found: Solved) -> list[Solved]:
    return [found.take(np.array([i])) for i in range(len(found.value))]
