"""The shape of a study: what a run loses because N and D are off the optimum of its budget.

    fit_shape   the Chinchilla form, L = A N^-alpha + B D^-beta + E, fitted with a free level of
                every budget, so that errors of the level don't bend the exponents
    excess      log loss of a run above that of the optimum of its budget

Invariant: a factor on all losses of one budget hardly changes the shape. Units change nothing.

The constants are of log loss; they were chosen by backtests on nine public tables
(analysis/backtest.py).
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize

from forescale.scaling.fitting.points import Array, Points

NOISE = 0.003  # deviation of a run at the optimum: other seeds move the loss by about this
# Deviation of a run per unit of its excess: the form itself is wrong by a third of what a run is
# off, so that runs far from the optimum have little weight.
OFF = 0.3
FREE = 1.0  # deviation of a budget's level; far more than any error of a form, so as good as free
HUBER = 1.5  # in deviations: a run further away pulls no harder than one at this distance
_GRID = tuple(product((0.1, 0.2, 0.35, 0.55, 0.9), repeat=2))  # exponents where the search starts
_STARTS = 3  # the best points of the grid from which the search starts
_LEAST_SHARE = 1e-4  # of the mean loss: no term of a start is smaller, for its logarithm
_LOW, _HIGH = [-30.0, -30, -30, 0.005, 0.005], [10.0, 10, 10, 4, 4]  # ends of theta


@dataclass(frozen=True)
class Shape:
    """A fitted form: log L = log(exp(a - alpha x) + exp(b - beta z) + exp(e)), up to a level. x, z:
    log N and log D minus their means over the fitted runs, which are `centre`; theta: (a, b, e,
    alpha, beta); per: C / (N D) of the last budget's runs, its median."""

    theta: Array
    centre: tuple[float, float]
    per: float

    def log_loss(self, log_n: Array, log_d: Array) -> Array:
        """Return log loss at log N and log D, up to a constant of each budget."""
        x, z = log_n - self.centre[0], log_d - self.centre[1]
        return np.logaddexp.reduce(_logs(self.theta, x, z), axis=0)

    def optimum(self, log_c: Array | float) -> Array:
        """Return log N* at log C, where alpha A N^-alpha = beta B D^-beta and C = per N D."""
        a, b, _, alpha, beta = self.theta
        log_nd = log_c - np.log(self.per)
        left = a + np.log(alpha) + alpha * self.centre[0]
        right = b + np.log(beta) - beta * (log_nd - self.centre[1])
        return (left - right) / (alpha + beta)

    def excess(self, log_n: Array, log_d: Array, log_c: Array | float) -> Array:
        """Return log loss at log N and log D above that of the optimum at log C; at least 0."""
        best = self.optimum(log_c)
        lowest = self.log_loss(best, log_c - np.log(self.per) - best)
        return np.maximum(0.0, self.log_loss(log_n, log_d) - lowest)


def excess(log_loss: Array, budgets: Array) -> Array:
    """Return the log loss of each run minus the lowest of its budget, (n,)."""
    above = np.empty_like(log_loss)
    for c in np.unique(budgets):
        above[budgets == c] = log_loss[budgets == c] - log_loss[budgets == c].min()
    return above


def fit_shape(points: Points, budgets: Array) -> Shape:
    """Fit the form to runs. budgets: the nominal budget of each run, (n,).

    It minimises Huber's function of whitened residuals of log loss. Within a budget, residuals have
    the covariance diag(NOISE^2 + (OFF excess)^2) + FREE^2. The search starts from the best points
    of a grid of exponents, where A, B and E are found by non-negative least squares.
    """
    log_n, log_d, y = (points.log(c) for c in ("parameters", "tokens", "loss"))
    centre = float(log_n.mean()), float(log_d.mean())
    x, z = log_n - centre[0], log_d - centre[1]
    whitened = _Whitening.of(y, budgets)

    def residual(theta: Array) -> Array:
        rest = y - np.logaddexp.reduce(_logs(theta, x, z), axis=0)
        return whitened(rest[:, None])[:, 0]

    def jacobian(theta: Array) -> Array:
        logs = _logs(theta, x, z)
        p = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
        return -whitened(np.stack((p[0], p[1], p[2], -p[0] * x, -p[1] * z), axis=1))

    ones, starts = whitened(np.ones_like(x)[:, None])[:, 0], []
    for alpha, beta in _GRID:
        terms = np.stack((np.exp(-alpha * x), np.exp(-beta * z), np.ones_like(x)), axis=1)
        shares, error = optimize.nnls(whitened(terms / points.loss[:, None]), ones)
        logs = np.log(np.maximum(shares, _LEAST_SHARE * points.loss.mean()))
        starts.append((error, np.array([*logs, alpha, beta])))
    minima = [
        optimize.least_squares(
            residual, start, jacobian, bounds=(_LOW, _HIGH), loss="huber", f_scale=HUBER,
            max_nfev=200,
        )
        for _, start in sorted(starts, key=lambda start: float(start[0]))[:_STARTS]
    ]  # fmt: skip
    theta = min(minima, key=lambda one: float(one.cost)).x
    last = budgets == budgets.max()
    per = float(np.median(budgets[last] / np.exp((log_n + log_d)[last])))
    return Shape(theta, centre, per)


def _logs(theta: Array, x: Array, z: Array) -> Array:
    """Return the logarithms of the three terms, (3, ...), at centred log N and log D."""
    a, b, e, alpha, beta = theta
    return np.stack((a - alpha * x, b - beta * z, e + 0 * x))


@dataclass(frozen=True)
class _Whitening:
    """A linear map that makes residuals of runs independent with a variance of 1.

    With the covariance diag(v) + FREE^2 within a budget, it is (I + (s - 1) u u^T) diag(v)^-1/2,
    where u is the unit vector along v^-1/2, and s = (1 + FREE^2 sum 1/v)^-1/2: O(n), for any
    number of runs. scale: v^-1/2; unit: u; group: the budget's place; shrink: s - 1 of each budget.
    """

    scale: Array
    unit: Array
    group: Array
    shrink: Array

    @classmethod
    def of(cls, log_loss: Array, budgets: Array) -> "_Whitening":
        scale = 1 / np.hypot(NOISE, OFF * excess(log_loss, budgets))
        group = np.unique(budgets, return_inverse=True)[1]
        squares = np.bincount(group, scale**2)
        shrink = 1 / np.sqrt(1 + FREE**2 * squares) - 1
        return cls(scale, scale / np.sqrt(squares)[group], group, shrink)

    def __call__(self, x: Array) -> Array:
        """Return x, (n, k), whitened along its first axis."""
        y = self.scale[:, None] * x
        each = (self.unit[:, None] * y).T
        along = np.stack([np.bincount(self.group, column) for column in each], axis=1)
        return y + self.unit[:, None] * (self.shrink[:, None] * along)[self.group]
