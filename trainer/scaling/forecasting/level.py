"""The level of a study: the lowest loss of each budget, and its continuation to larger budgets.

    levels       of each budget: the lowest log loss, and a smoothed one, which one lucky run moves
                 less
    extrapolate  L(C) = E + K C^-gamma, averaged over gamma, plus a slow drift about that curve;
                 budgets far from the target count less

Invariant: a level reads the runs of its own budget alone. Units of N and C change nothing.

The constants are of log loss, per decade of C. They were chosen by backtests on nine public tables
(analysis/backtest.py), so that errors on those tables are a little smaller than on new ones.
They suit curves with noise and bends: a power law without either is not continued exactly.
"""

from dataclasses import dataclass

import numpy as np

from forescale.scaling.fitting.points import Array, Points

# The prior of the exponent: log gamma ~ N(log GAMMA, SPREAD^2). Published exponents of L(C) are
# 0.05 (Kaplan et al. 2020) to 0.18 (by the law of Besiroglu et al. 2024); a few budgets give none.
GAMMA, SPREAD = 0.15, 1.0
NOISE = 0.003  # deviation of a level: seeds, and sizes that miss the optimum, move it by about this
# How much the slope of the errors changes within a decade. Real curves bend off every power law;
# twice the value follows the noise, and none trusts the form as if it were exact.
DRIFT = 0.033
# Further deviation of a known level at a distance of one decade from the target. It grows with the
# power 3/2 of the distance, as the errors of a drifting slope do.
FORGET = 0.01
# A parabola reads the runs within NEAR of the lowest, as the law does: loss isn't parabolic in log
# N further away; but FEWEST runs at least.
NEAR, FEWEST = 0.04, 5
# Weight of the parabola's vertex against the lowest run. The lowest run is too low by luck and too
# high for want of sizes, and a vertex depends on its parabola: the mean errs less than either.
VERTEX = 0.5
_GAMMAS = np.geomspace(0.02, 0.8, 40)  # where gamma's posterior is summed; wider changes nothing
_LEAST_SHARE = 1e-9  # of the last loss: a forecast stays positive


@dataclass(frozen=True)
class Levels:
    """The levels of a study's B budgets, ascending; (B,) each. log_budgets: log C; lowest: log of
    the lowest loss; smooth: the mean of that and of the vertex."""

    log_budgets: Array
    lowest: Array
    smooth: Array

    @property
    def offset(self) -> float:
        """Return the mean of lowest - smooth: the lowest of some noisy runs is a little off the
        smooth level, and in each budget alike."""
        return float(np.mean(self.lowest - self.smooth))


def levels(points: Points, budgets: Array) -> Levels:
    """Return the levels of runs. budgets: the nominal budget of each run, (n,)."""
    x, y, distinct = points.log("parameters"), points.log("loss"), np.unique(budgets)
    groups = [budgets == c for c in distinct]
    lowest = np.array([y[mask].min() for mask in groups])
    at_vertex = np.array([vertex(x[mask], y[mask]) for mask in groups])
    return Levels(np.log(distinct), lowest, (1 - VERTEX) * lowest + VERTEX * at_vertex)


def vertex(log_n: Array, log_loss: Array) -> float:
    """Return the log loss at the vertex of one budget's parabola in log N. It is that of the lowest
    run if the kept runs have fewer than four sizes, if the parabola has no minimum, or if its
    minimum is outside their sizes."""
    lowest = float(log_loss.min())
    order = np.argsort(log_loss, kind="stable")
    near = np.union1d(np.flatnonzero(log_loss <= lowest + NEAR), order[:FEWEST])
    x = log_n[near] - log_n[order[0]]
    if len(np.unique(x)) < 4:
        return lowest
    bend, slope, level = np.polyfit(x, log_loss[near], 2)
    if bend <= 0 or not x.min() <= -slope / (2 * bend) <= x.max():
        return lowest
    return float(level - slope**2 / (4 * bend))


def extrapolate(x: Array, y: Array, target: float) -> float:
    """Return the log loss at log C = target, from levels y at log C = x, ascending, two at least.

    For each gamma, generalised least squares of

        L = c0 + c1 (e^(-gamma X) - 1) / gamma,  X = x - x[-1],  E = c0 - c1 / gamma >= 0 (else 0),

    with errors of log loss of the covariance of `_covariance`. The forecast of one gamma is its
    curve at the target, plus the mean of the drift there, given the errors at the known budgets. It
    is weighted by the prior of gamma times the likelihood of y, integrated over c0 and c1.
    """
    n, X = len(x), np.append(x, target) - x[-1]
    K = _covariance(X / np.log(10))
    inverse = np.linalg.inv(K[:n, :n])
    z = np.exp(y - y[-1])  # loss over the last loss
    P = inverse / np.outer(z, z)
    # The curve of every gamma at the budgets and the target, (G, n+1).
    g = _GAMMAS[:, None]
    basis = np.stack((np.ones((len(g), n + 1)), np.expm1(-g * X) / g), axis=-1)  # (G, n+1, 2)
    A = basis[:, :n]
    PA = P @ A
    H = A.swapaxes(1, 2) @ PA
    c = np.linalg.solve(H, (PA.swapaxes(1, 2) @ z)[..., None])
    curve = (basis @ c)[..., 0]
    below = c[:, 0, 0] < c[:, 1, 0] / _GAMMAS  # E < 0: a pure power law instead
    power = np.exp(-g[below] * X)
    known = power[:, :n]
    curve[below] = power * ((known @ P @ z) / ((known @ P) * known).sum(1))[:, None]
    fitted, ahead, log_det = curve[:, :n], curve[:, n], np.linalg.slogdet(H)[1]
    rest = z - fitted
    log_weight = -0.5 * ((rest @ P) * rest).sum(1) - 0.5 * log_det
    log_weight -= 0.5 * (np.log(_GAMMAS / GAMMA) / SPREAD) ** 2
    weight = np.exp(log_weight - log_weight.max())
    drift = (rest / z) @ (inverse @ K[n, :n])
    log_loss = np.log(np.maximum(ahead * (1 + drift), _LEAST_SHARE))
    return float(weight @ log_loss / weight.sum() + y[-1])


def _covariance(decades: Array) -> Array:
    """Return the covariance of the errors of log loss at the budgets and the target, (n+1, n+1).

        K(i, j) = DRIFT^2 m^2 (3 M - m) / 6 + [i = j] (NOISE^2 + FORGET^2 |d_i|^3)

    u: decades from the first budget; m, M: the smaller and the larger of u_i and u_j; d_i: decades
    from a budget to the target. The first term is an integrated random walk: the slope of the error
    is a random walk. The target itself has no noise.
    """
    u, n = decades - decades[0], len(decades) - 1
    small, large = np.minimum(u[:, None], u), np.maximum(u[:, None], u)
    K: Array = DRIFT**2 * small**2 * (3 * large - small) / 6
    K[np.arange(n), np.arange(n)] += NOISE**2 + FORGET**2 * np.abs(u[-1] - u[:n]) ** 3
    return K
