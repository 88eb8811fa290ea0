"""A damped Newton method that solves many small fits in one batch, each to a stationary point.

Replicates differ in their start, their weights or their losses, never in N and D. Each has its own
damping and leaves the batch when it is done. Steps are taken in coordinates in which the Hessian of
reweighted least squares is the identity, so that units and correlations of the parameters don't
matter. Negative curvatures enter by their absolute value, so that saddles don't attract. Parameters
stay within a box: a parameter at an end is frozen while the descent direction points outwards.

A law that is a sum of terms c x^-alpha has long bent valleys: if alpha is small, the runs determine
only c alpha, and c plus the constant. In the coordinates c and c alpha these valleys are straight.
In theta, log c and alpha, the valleys of a term that only the smallest runs determine are straight.
A replicate begins with the first coordinates, and changes between the two whenever a step fails.
Invariant: no step raises the objective by more than its rounding error, and the returned scaled
gradient was computed at the returned theta.
"""

from dataclasses import dataclass

import numpy as np

from forescale.scaling.fitting.forms import Design, Form
from forescale.scaling.fitting.objective import (
    Local,
    Objective,
    Rows,
    curvatures,
    local,
    scaled_gradient,
)
from forescale.scaling.fitting.points import Array

TOLERANCE = 1e-8  # greatest scaled gradient that is certified
AIM = 1e-11  # scaled gradient at which the solver stops; it stops earlier only because of rounding
_CHUNK = 64  # replicates per batch at most, and losses: their arrays stay in the cache of a core
_LOSSES = 1 << 15
_STEPS = 300
_LEAST_FACTOR = 0.01  # a step multiplies a coefficient by this at least
_OPEN = 3e5  # greatest stretch; its square is a condition number that leaves no digits


@dataclass
class Solved(Rows):
    """The end points of R replicates.

    theta: (R, p); value: (R,); gradient: scaled, (R,); curvature: the least eigenvalue of the
    Hessian of the free parameters relative to that of reweighted least squares, positive at a
    minimum, (R,); edge: -1 or 1 for a parameter at the lower or upper end of its box, (R, p).
    """

    theta: Array
    value: Array
    gradient: Array
    curvature: Array
    edge: Array

    @property
    def is_minimum(self) -> Array:
        """Return True for each replicate that is at a minimum, (R,)."""
        return (self.gradient <= TOLERANCE) & (self.curvature > 0)


@dataclass(frozen=True)
class Minimisation:
    """What all replicates share. low, high: ends of the box, (p,); aim: scaled
    gradient to stop at."""

    form: Form
    at: Design
    goal: Objective
    low: Array
    high: Array
    aim: float = AIM

    def frozen(self, theta: Array, gradient: Array) -> Array:
        """Return True for parameters that are at an end and pushed outwards, (R, p)."""
        return (theta <= self.low) & (gradient > 0) | (theta >= self.high) & (gradient < 0)

    def left(self, theta: Array, here: Local) -> Array:
        """Return the scaled gradient of the free parameters, (R,)."""
        free = ~self.frozen(theta, here.gradient)
        return scaled_gradient(here.gradient, here.pulls, free)


def solve(task: Minimisation, log_loss: Array, weight: Array, start: Array) -> Solved:
    """Return the stationary points that the starts reach. log_loss, weight: (R, n) or (1, n);
    start: (R, p) or (1, p)."""
    R = max(len(log_loss), len(weight), len(start))
    size = min(_CHUNK, max(1, _LOSSES // log_loss.shape[1]))
    spans = [slice(i, i + size) for i in range(0, R, size)]
    arrays = log_loss, weight, start
    # A step to an infinite loss is rejected, so its overflow needs no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        return Solved.join([_solve(task, *(_rows(each, s) for each in arrays)) for s in spans])


def _rows(array: Array, which: Array | slice) -> Array:
    return array if len(array) == 1 else array[which]


def _solve(task: Minimisation, log_loss: Array, weight: Array, start: Array) -> Solved:
    y, w, t = log_loss, weight, np.clip(start, task.low, task.high)
    here = local(task.form, task.at, y, w, t, task.goal)
    R = len(here.value)
    t = np.broadcast_to(t, (R, t.shape[1]))
    ids = np.arange(R)  # replicates that are not done
    done = list[tuple[Array, Array, Local]]()  # the others: numbers, theta, what is there
    damping, left = np.full(R, 1e-2), task.left(t, here)
    steps = 0
    tries, linear = np.zeros(R, dtype=int), np.ones(R, dtype=bool)
    while len(ids):
        # After 20 rejections in a row nothing but rounding is left to gain.
        going = (left > task.aim) & (tries < 20) & (steps < _STEPS)
        if not going.all():
            done.append((ids[~going], t[~going], here.take(~going)))
            ids, t, here = ids[going], t[going], here.take(going)
            y, w = _rows(y, going), _rows(w, going)
            damping, left = damping[going], left[going]
            tries, linear = tries[going], linear[going]
        if not len(ids):
            break
        steps += 1
        step, gain = _step(task, w, t, here, damping, linear)
        new = np.clip(t + step, task.low, task.high)
        there = local(task.form, task.at, y, w, new, task.goal)
        there_left = task.left(new, there)
        fell = here.value - there.value
        rounding = 1e-13 * here.value
        # Near the end the objective is equal up to rounding; the gradient still falls.
        good = (fell > rounding) | ((np.abs(fell) <= rounding) & (there_left < left))
        with np.errstate(invalid="ignore", divide="ignore"):
            trust = np.where(np.abs(fell) <= rounding, 1.0, fell / gain)
        damping = np.where(
            good,
            np.where(trust > 0.5, damping * 0.1, np.where(trust < 0.2, damping * 3, damping)),
            np.maximum(damping, 1e-4) * 5,
        )
        tries = np.where(good, 0, tries + 1)
        bad = ~good
        linear = linear ^ bad
        there.put(bad, here)
        new[bad] = t[bad]
        t, here, left = new, there, np.where(good, there_left, left)
    order = np.argsort(np.concatenate([ids for ids, _, _ in done]))
    final = np.concatenate([t for _, t, _ in done])[order]
    last = Local.join([here for _, _, here in done]).take(order)
    return measured(task, log_loss, weight, final, last)


def _step(
    task: Minimisation, w: Array, t: Array, here: Local, damping: Array, linear: Array
) -> tuple[Array, Array]:
    """Return the step, (R, p), and the decrease that the quadratic model predicts for it, (R,).
    linear: True to take it in coefficients c and products c alpha, not in log c and alpha, (R,)."""
    frozen = task.frozen(t, here.gradient)
    values, vectors, back, _ = _whitened(task, w, t, here, frozen, linear)
    g = np.where(frozen, 0.0, here.gradient)
    turned = (vectors.swapaxes(1, 2) @ (back.swapaxes(1, 2) @ g[:, :, None]))[:, :, 0]
    size = np.abs(values) + damping[:, None] + 1e-10
    along = -turned / size
    gain = -(turned * along + values * along**2 / 2).sum(-1)
    step = (back @ (vectors @ along[:, :, None]))[:, :, 0]
    step = np.where(frozen, 0.0, step)
    for c, e in task.form.summands():
        factor = np.where(linear, np.maximum(1 + step[:, c], _LEAST_FACTOR), 1.0)
        step[:, c] = np.where(linear, np.log(factor), step[:, c])
        if e >= 0:
            step[:, e] /= factor
    return step, gain


def _whitened(
    task: Minimisation, w: Array, t: Array, here: Local, frozen: Array, linear: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Return the Hessian in coordinates in which that of reweighted least squares is the identity.

    As its eigenvalues, (R, p), and eigenvectors, (R, p, p); the map back to theta, (R, p, p); and
    the greatest stretch of that map after scaling the parameters, (R,). Frozen parameters are
    decoupled, with eigenvalue 1. linear: see _step; the Hessian by other coordinates differs by
    their second derivatives times the gradient.
    """
    hessian, sphere = curvatures(task.form, task.at, w, t, task.goal, here)
    p = t.shape[1]
    if linear is not None:
        g = here.gradient * linear[:, None]
        for c, e in task.form.summands():
            hessian[:, c, c] -= g[:, c]
            if e >= 0:
                hessian[:, c, e] -= g[:, e]
                hessian[:, e, c] -= g[:, e]
    one = np.eye(p)
    aside = frozen[:, :, None] | frozen[:, None, :]
    # The gradient of a vanishing term falls e-fold by a step of -1 in its log coefficient. This
    # bounds the step by 1, which reweighted least squares alone would not do.
    sphere = sphere + np.abs(here.gradient)[:, :, None] * one
    size = np.sqrt(np.maximum(np.einsum("rii->ri", sphere), 1e-300))
    unit = 1 / (size[:, :, None] * size[:, None, :])
    sphere = np.where(aside, one, sphere * unit) + 1e-13 * one
    hessian = np.where(aside, one, hessian * unit)
    lower = np.linalg.cholesky(sphere)
    inverse = np.linalg.inv(lower)
    values, vectors = np.linalg.eigh(inverse @ hessian @ inverse.swapaxes(1, 2))
    back = inverse.swapaxes(1, 2) / size[:, :, None]
    return values, vectors, back, np.abs(inverse).max((1, 2))


def measured(
    task: Minimisation, y: Array, w: Array, theta: Array, here: Local | None = None
) -> Solved:
    """Return value, scaled gradient, curvature and edges at theta, (R, p), without a step."""
    here = local(task.form, task.at, y, w, theta, task.goal) if here is None else here
    frozen = task.frozen(theta, here.gradient)
    values, _, _, stretch = _whitened(task, w, theta, here, frozen)
    # If the runs don't determine a direction, the curvature along it is rounding of either sign.
    curvature = np.where(stretch < _OPEN, values.min(-1), np.minimum(values.min(-1), 0.0))
    edge = np.where(theta <= task.low, -1.0, 0.0) + np.where(theta >= task.high, 1.0, 0.0)
    return Solved(theta, here.value, task.left(theta, here), curvature, edge)
