"""Many small fits at once, each to a stationary point: a damped Newton method in batches.

Replicates differ in their start, their weights or their losses, never in N and D. Each has its own
damping; those that are done leave the batch. Steps are taken in coordinates in which reweighted
least squares is a sphere, so that units and correlations of the parameters do not matter, and
negative curvature is turned over, so that no saddle attracts. Parameters stay within a box: one at
its edge, which the gradient pushes outwards, is frozen until it is pulled back.
Invariant: no step ever raises the objective beyond its rounding error, and what is returned as
scaled gradient was computed at the theta that is returned.
"""

from dataclasses import dataclass

import numpy as np

from forescale.scaling.fitting.forms import Design, Form
from forescale.scaling.fitting.objective import Local, Objective, curvatures, local, scaled_gradient
from forescale.scaling.fitting.points import Array

TOLERANCE = 1e-8  # of the scaled gradient: what a certificate asks for
_AIM = 1e-11  # what the solver goes for; it stops short of it only where rounding does
_CHUNK = 64  # replicates: their arrays stay in the cache of a core
_STEPS = 300
_OPEN = 3e5  # a stretch: the square root of a condition number that leaves no digits


@dataclass
class Solved:
    """Of R replicates. theta (R, p); value, gradient (scaled), curvature (R,): the least eigenvalue
    of the Hessian against that of reweighted least squares, of the free parameters: positive at a
    minimum; edge (R, p): -1 or 1 for a parameter at the lower or upper end of its box."""

    theta: Array
    value: Array
    gradient: Array
    curvature: Array
    edge: Array
    steps: int

    def take(self, which: Array) -> "Solved":
        own = {k: v[which] for k, v in vars(self).items() if k != "steps"}
        return Solved(**own, steps=self.steps)


def join(parts: list[Solved]) -> Solved:
    names = ("theta", "value", "gradient", "curvature", "edge")
    rows = {k: np.concatenate([getattr(p, k) for p in parts]) for k in names}
    return Solved(**rows, steps=max(p.steps for p in parts))


@dataclass(frozen=True)
class Task:
    """What all replicates share. low, high: (p,), equal for a parameter that is held."""

    form: Form
    at: Design
    goal: Objective
    low: Array
    high: Array

    def frozen(self, theta: Array, gradient: Array) -> Array:
        """(R, p): held, or at an edge and pushed outwards."""
        out = (theta <= self.low) & (gradient > 0) | (theta >= self.high) & (gradient < 0)
        return out | (self.low == self.high)

    def left(self, theta: Array, here: Local) -> Array:
        """The scaled gradient, (R,)."""
        free = ~self.frozen(theta, here.gradient)
        return scaled_gradient(here.gradient, here.pulls, free)


def solve(task: Task, log_loss: Array, weight: Array, start: Array) -> Solved:
    """log_loss, weight: (R, n) or (1, n); start: (R, p) or (1, p)."""
    R = max(len(log_loss), len(weight), len(start))
    start = np.broadcast_to(start, (R, start.shape[1]))
    spans = [slice(i, i + _CHUNK) for i in range(0, R, _CHUNK)]
    # A step that leads to an infinite loss is one that is not taken.
    with np.errstate(over="ignore", invalid="ignore"):
        return join([_solve(task, _rows(log_loss, s), _rows(weight, s), start[s]) for s in spans])


def _rows(given: Array, which: Array | slice) -> Array:
    return given if len(given) == 1 else given[which]


def _solve(task: Task, log_loss: Array, weight: Array, start: Array) -> Solved:
    theta = np.clip(start, task.low, task.high)
    R = len(theta)
    ids = np.arange(R)  # of those that go on
    damping, left = np.full(R, 1e-2), np.full(R, np.inf)
    final = theta.copy()
    steps = 0
    y, w, t = log_loss, weight, theta
    here = local(task.form, task.at, y, w, t, task.goal)
    left = task.left(t, here)
    tries = np.zeros(R, dtype=int)
    while steps < _STEPS:
        # Rejected so often in a row: nothing but rounding is left to gain.
        going = (left > _AIM) & (tries < 20)
        if not going.all():
            final[ids[~going]] = t[~going]
            ids, t, here = ids[going], t[going], here.rows(going)
            y, w = _rows(y, going), _rows(w, going)
            damping, left, tries = damping[going], left[going], tries[going]
        if not len(ids):
            break
        steps += 1
        step, gain = _step(task, w, t, here, damping)
        new = np.clip(t + step, task.low, task.high)
        there = local(task.form, task.at, y, w, new, task.goal)
        there_left = task.left(new, there)
        fell = here.value - there.value
        rounding = 1e-13 * here.value
        # Near the end the objective no longer tells two points apart; the gradient still does.
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
        there.put(bad, here)
        new[bad] = t[bad]
        t, here, left = new, there, np.where(good, there_left, left)
    final[ids] = t
    return measured(task, log_loss, weight, final, steps)


def _step(task: Task, w: Array, t: Array, here: Local, damping: Array) -> tuple[Array, Array]:
    """The step (R, p), and what the quadratic model gains by it (R,)."""
    frozen = task.frozen(t, here.gradient)
    values, vectors, back, _ = _whitened(task, w, t, here, frozen)
    g = np.where(frozen, 0.0, here.gradient)
    turned = (vectors.swapaxes(1, 2) @ (back.swapaxes(1, 2) @ g[:, :, None]))[:, :, 0]
    size = np.abs(values) + damping[:, None] + 1e-10
    along = -turned / size
    gain = -(turned * along + values * along**2 / 2).sum(-1)
    step = (back @ (vectors @ along[:, :, None]))[:, :, 0]
    return np.where(frozen, 0.0, step), gain


def _whitened(
    task: Task, w: Array, t: Array, here: Local, frozen: Array
) -> tuple[Array, Array, Array, Array]:
    """Eigenvalues (R, p) and vectors (R, p, p) of the Hessian where reweighted least squares is a
    sphere, the way back from there (R, p, p), and by how much it stretches (R,), the parameters
    having been scaled. Frozen parameters stand aside with eigenvalue 1."""
    hessian, sphere = curvatures(task.form, task.at, w, t, task.goal, here)
    p = t.shape[1]
    one = np.eye(p)
    aside = frozen[:, :, None] | frozen[:, None, :]
    # A term that has faded pulls by its share of the loss, which falls e-fold by a step of -1: no
    # step of Newton's is longer, and reweighted least squares alone would not know.
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


def measured(task: Task, log_loss: Array, weight: Array, theta: Array, steps: int = 0) -> Solved:
    """What there is to say of theta (R, p), without moving it."""
    here = local(task.form, task.at, log_loss, weight, theta, task.goal)
    frozen = task.frozen(theta, here.gradient)
    values, _, _, stretch = _whitened(task, weight, theta, here, frozen)
    # Where the runs leave a direction open, a curvature along it is rounding of either sign.
    curvature = np.where(stretch < _OPEN, values.min(-1), np.minimum(values.min(-1), 0.0))
    left = task.left(theta, here)
    return Solved(theta, here.value, left, curvature, ends(task, theta), steps)


def ends(task: Task, theta: Array) -> Array:
    """(R, p): -1 or 1 at the lower or the upper end of the box, 0 elsewhere and where held."""
    edge = np.where(theta <= task.low, -1.0, 0.0) + np.where(theta >= task.high, 1.0, 0.0)
    return np.where(task.low == task.high, 0.0, edge)
