"""Solve least absolute deviations, whose objective has kinks that a smooth solver can't resolve.

The sum of |r| is first replaced by Huber's function over delta, with delta from 1e-2 down to 1e-7,
each solved from the solution before. At the optimum the law passes exactly through the runs within
delta: usually as many as there are free parameters (a corner), sometimes fewer (an edge). Newton
steps on the optimality conditions, with these residuals held at zero, then lead to the optimum.
Invariant: a point is certified by the subgradient of the sum of |r|, never by that of the smoothed
objective.
"""

from dataclasses import dataclass, replace

import numpy as np

from forescale.scaling.fitting.newton import TOLERANCE, Minimisation, Solved, ends, solve
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, Local, local, scaled_gradient
from forescale.scaling.fitting.points import Array

SMOOTHED = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
FINER = (1e-8, 1e-9)  # used if a run within the last delta is not one that the optimum touches
_TOUCHES = 1e-11  # greatest residual that counts as zero
_FLAT = 1e-10  # greatest curvature, or relative singular value, that counts as zero


def _smoothed(task: Minimisation, delta: float) -> Minimisation:
    return replace(task, goal=replace(task.goal, delta=delta))


def solve_absolute(task: Minimisation, log_loss: Array, weight: Array, start: Array) -> Solved:
    """Return the minima reached, as newton.solve does, for a task whose delta is 0."""
    theta = start
    for delta in SMOOTHED[:-1]:
        theta = solve(_smoothed(task, delta), log_loss, weight, theta).theta
    R = len(theta)
    y, w = (np.broadcast_to(v, (R, v.shape[1])) for v in (log_loss, weight))
    done: dict[int, Solved] = {}
    for delta in (SMOOTHED[-1], *FINER):
        rest = [r for r in range(R) if r not in done or done[r].gradient[0] > TOLERANCE]
        if not rest:
            break
        near = _smoothed(task, delta)
        theta[rest] = solve(near, y[rest], w[rest], theta[rest]).theta
        for r in rest:
            problem = near, y[r : r + 1], w[r : r + 1]
            smooth = measured(*problem, theta[r : r + 1])
            exact = measured(*problem, _onto_kink(*problem, theta[r : r + 1]))
            # The smoothed minimum is at most delta / 2 per run above that of the sum of |r|.
            lower = exact.value[0] <= smooth.value[0] + delta / 2 * w[r].sum()
            done[r] = exact if lower and exact.gradient[0] <= TOLERANCE else smooth
    return Solved.join([done[r] for r in range(R)])


@dataclass
class _Kink:
    """The objective around theta, (1, p), for its q free parameters. free: their mask, (p,); slope:
    derivatives of the fitted loss or log loss, (q, n); rest: what runs that the law doesn't touch
    give to the gradient, (q,); pulls: its scale, (q,)."""

    here: Local
    free: Array
    slope: Array
    rest: Array
    pulls: Array

    def hessian(self, task: Minimisation, theta: Array, pull: Array) -> Array:
        """Return the Hessian of the Lagrangian, (q, q). pull: the weight times the sign or the
        multiplier of each run, (n,)."""
        J = self.here.jacobian
        if self.here.scale is not None:
            pull = pull * self.here.scale[0]
        hessian = task.form.curvature(theta, task.at, J, -pull[None])[0]
        if self.here.scale is None:  # the residual is of log L
            hessian = hessian + (J[0] * pull) @ J[0].T
        return hessian[np.ix_(self.free, self.free)]


def _kink(task: Minimisation, y: Array, w: Array, theta: Array, touched: Array) -> _Kink:
    here = local(task.form, task.at, y, w, theta, task.goal)
    free = ~task.frozen(theta, here.gradient)[0]
    slope = here.jacobian[0] if here.scale is None else here.jacobian[0] * here.scale[0]
    signs = np.where(touched, 0.0, np.sign(here.residual[0]))
    slope = slope[free]
    pulls = np.maximum(np.abs(slope) @ w[0], 1e-100)  # a term that underflowed has 0
    return _Kink(here, free, slope, slope @ (w[0] * signs), pulls)


def _onto_kink(task: Minimisation, y: Array, w: Array, theta: Array) -> Array:
    """Move theta, (1, p), to the optimum near it by Newton's method on the optimality conditions.
    theta must be the minimum of the smoothed `task`."""
    new = theta
    none = np.zeros(y.shape[1], dtype=bool)
    first = _kink(task, y, w, new, none)
    size = np.where(w[0] > 0, np.abs(first.here.residual[0]), np.inf)
    touched = size <= 1.001 * task.goal.delta
    multiplier = np.clip(first.here.residual[0] / task.goal.delta, -1, 1)
    for _ in range(8):
        at = _kink(task, y, w, new, touched)
        pull = w[0] * np.where(touched, multiplier, np.sign(at.here.residual[0]))
        across = at.slope[:, touched]
        k, q = across.shape[1], len(across)
        system = np.zeros((q + k, q + k))
        system[:q, :q] = at.hessian(task, new, pull)
        system[:q, q:] = -across * w[0][touched]
        system[q:, :q] = across.T
        if not np.isfinite(system).all():
            return theta
        # The shortest solution, because the multipliers of a run listed twice are not unique.
        step = np.linalg.lstsq(system, np.append(at.rest, at.here.residual[0][touched]))[0]
        moved = new.copy()
        moved[0, at.free] += step[:q]
        new = np.clip(moved, task.low, task.high)
        multiplier[touched] = np.clip(step[q:], -1, 1)
    return new


def measured(task: Minimisation, y: Array, w: Array, theta: Array) -> Solved:
    """Return value, scaled subgradient, curvature and edges at theta, (1, p), without a step.

    A run that the law passes through may contribute anything between -1 and 1 times its weight: the
    multipliers are those that cancel the other contributions best. gradient: what remains, scaled;
    curvature: 1 minus the largest multiplier and, along an edge, the curvature of the Lagrangian if
    that is less (Watson 1980, Approximation Theory and Numerical Methods, chapter 6).
    """
    task = _smoothed(task, task.goal.delta or SMOOTHED[-1])
    residual = local(task.form, task.at, y, w, theta, task.goal).residual
    touched = (np.abs(residual[0]) <= _TOUCHES) & (w[0] > 0)
    at = _kink(task, y, w, theta, touched)
    across = at.slope[:, touched] * w[0][touched] / at.pulls[:, None]
    s = np.linalg.lstsq(across, -at.rest / at.pulls, rcond=None)[0]
    multiplier = np.clip(s, -1, 1)
    gradient = at.rest / at.pulls + across @ multiplier
    left = scaled_gradient(gradient[None], np.ones((1, len(gradient))), np.array(True))
    curvature = 1 - float(np.abs(s).max(initial=0.0))
    directions, sizes, _ = np.linalg.svd(across)
    along = directions[:, (sizes > _FLAT * sizes.max(initial=0.0)).sum() :]
    if along.size:
        pull = w[0] * np.sign(np.where(touched, 0.0, residual[0]))
        pull[touched] = w[0][touched] * multiplier
        hessian = at.hessian(task, theta, pull) / np.outer(at.pulls, at.pulls) * w.sum()
        least = float(np.linalg.eigvalsh(along.T @ hessian @ along)[0])
        curvature = min(curvature, least if abs(least) > _FLAT else 0.0)
    value = LEAST_ABSOLUTE.value(residual, w)
    return Solved(theta, value, left, np.array([curvature]), ends(task, theta))
