"""A sudden gain: losses that fall faster than any law allows between two budgets.

    paths   the lowest losses of the budgets, by parabolas; losses of one size at several C
    bend    by how much the middle of three neighbours is above the line through the others, in
            log L and log C: never for L = E + k C^-a, beyond the noise
    noise   of runs around the parabolas, pooled; without budgets that of runs around the law

Invariant: a bend counts only if at most one in a thousand tables would show it by noise, and the
fall becomes steeper by a fifth. Of 200 simulated tables each (a law with E and one without; noise
0.1, 0.3 and 1 %; 5 budgets of 5 sizes, 3.2 times apart) none had this doubt. With a drop of 10 %
within a factor 3 of C, somewhere between the second budget and the last but one, 190, 185 and 62 of
200 had it; of 6 budgets of 7 sizes, 4 times apart, 192, 191 and 134. None of nine public tables has
it (test_gain.py takes 20 of each). A gain below the second budget looks like a law.
"""

from collections.abc import Iterator

import numpy as np
from scipy.special import stdtrit

from forescale.scaling.fitting.fit import Fit
from forescale.scaling.fitting.points import Array, Points, spent

_CHANCE = 1e-3  # of a table without a gain to be doubted
_STEEPER = 1.2  # slope after over slope before
_NEAR = 0.08  # log loss above a budget's lowest, up to which its parabola is fitted
_FREE = 4  # degrees of freedom of the noise at least
_WIDE = 2  # neighbours of the middle are up to so many places away
_LEFT = 3  # budgets that a forecast within one regime needs

Path = tuple[Array, Array, Array]  # log C, log L and its error over the noise, (B,) each


def gain_doubts(points: Points, budgets: Array | None, law: Fit) -> list[str]:
    """Return a sentence if the losses show a sudden gain. points: all runs; budgets: of each, (n,),
    if they have any; law: the fitted one."""
    unknown = points.flops is None and (points.parameters is None or points.tokens is None)
    if unknown or points.varied:  # which bits or experts a run has moves its loss too
        return []
    x, y, paths = np.log(spent(points)), points.log("loss"), list[Path]()
    squares, freedom = 0.0, 0
    n = None if points.parameters is None else points.log("parameters")
    if budgets is not None and n is not None:
        path, squares, freedom = _minima(x, y, n, budgets)
        paths.append(path)
    if freedom < _FREE:  # the fit follows its runs, so that residuals are smaller than the noise
        freedom = max(1, len(law.points) - law.form.size)
        squares = freedom * float(1.4826 * np.median(np.abs(law.residuals))) ** 2
    if n is not None:
        near = _near(y, budgets)
        paths += _sizes(x[near], y[near], n[near])
    noise = max(float(np.sqrt(squares / freedom)), 1e-9)
    bends = [bend for path in paths for bend in _bends(*path)]
    sure = float(stdtrit(freedom, 1 - _CHANCE / max(1, len(bends))))
    gains = [(bend / error, *ends) for bend, error, steeper, *ends in bends
             if bend > sure * noise * error and steeper > _STEEPER]  # fmt: skip
    if not gains:
        return []
    _, low, high, fall, before = max(gains)
    below = np.unique(np.exp(x) if budgets is None else budgets)
    return [
        f"The loss falls faster than any law between {np.exp(low):.3g} and {np.exp(high):.3g} "
        f"FLOPs: by {-np.expm1(-fall):.1%}, where {-np.expm1(-before):.1%} would follow from the "
        "cheaper runs. Move the study to larger budgets, or forecast within one regime"
        + _rest(x, y, low, int((np.log(below) > low + 0.05).sum()))
    ]


def _rest(x: Array, y: Array, low: float, left: int) -> str:
    """Return how to leave out the runs below a gain. left: budgets above."""
    if left < _LEFT:
        return "."
    count = int((y >= y[x <= low + 0.05].min()).sum())
    return f": drop_largest={count} leaves out the runs before it."


def _near(y: Array, budgets: Array | None) -> Array:
    """Return the mask of the runs near the lowest loss of their budget; of all without budgets. Far
    off it short runs are hardly past their warm-up, and learn faster than any law."""
    if budgets is None:
        return np.ones(len(y), dtype=bool)
    lowest = {b: y[budgets == b].min() for b in np.unique(budgets)}
    return y <= np.array([lowest[b] for b in budgets]) + _NEAR


def _minima(x: Array, y: Array, n: Array, budgets: Array) -> tuple[Path, float, int]:
    """Return the path of the lowest losses, and the sum of squares around the parabolas with its
    degrees of freedom. x, y, n: log C, log loss and log N of each run."""
    rows, squares, freedom = list[tuple[float, float, float]](), 0.0, 0
    for budget in np.unique(budgets):
        at = budgets == budget
        near = at & _near(y, budgets)
        best = float(n[near][y[near].argmin()])
        level, error = float(y[near].min()), 1.0
        if len(np.unique(n[near].round(3))) > 3:
            X = np.vander(n[near] - best, 3)
            (bend, slope, start), rest, *_ = np.linalg.lstsq(X, y[near])
            place = float(np.clip(-slope / (2 * bend), *np.percentile(X[:, 1], [0, 100])))
            v = np.array([place**2, place, 1.0]) if bend > 0 else np.array([0.0, 0.0, 1.0])
            level = float(v @ (bend, slope, start))
            error = float(np.sqrt(v @ np.linalg.pinv(X.T @ X) @ v))
            squares, freedom = squares + float(rest.sum()), freedom + int(near.sum()) - 3
        rows.append((float(x[near].mean()), level, error))
    log_c, level, error = np.array(rows).T
    return (log_c, level, error), squares, freedom


def _sizes(x: Array, y: Array, n: Array) -> Iterator[Path]:
    """Yield the path of each size that has runs at several C."""
    names = n.round(2)
    for size in np.unique(names):
        of_size = names == size
        places = np.unique(x[of_size].round(2))
        groups = [of_size & (x.round(2) == place) for place in places]
        means = np.array([(x[g].mean(), y[g].mean(), g.sum() ** -0.5) for g in groups])
        yield means[:, 0], means[:, 1], means[:, 2]


def _bends(x: Array, y: Array, error: Array) -> Iterator[tuple[float, ...]]:
    """Yield for each middle and two neighbours: the bend, its error over the noise, the slope after
    over that before, log C of middle and end, the fall between these, and that by the slope
    before."""
    for j in range(1, len(x) - 1):
        for i in range(max(0, j - _WIDE), j):
            for k in range(j + 1, min(len(x), j + 1 + _WIDE)):
                w = (x[k] - x[j]) / (x[k] - x[i])
                bend = y[j] - w * y[i] - (1 - w) * y[k]
                of_bend = np.sqrt(error[j] ** 2 + (w * error[i]) ** 2 + ((1 - w) * error[k]) ** 2)
                before, after = (y[j] - y[i]) / (x[j] - x[i]), (y[k] - y[j]) / (x[k] - x[j])
                steeper = after / before if before < 0 else np.inf
                yield bend, of_bend, steeper, x[j], x[k], y[j] - y[k], before * (x[j] - x[k])
