"""The fit of a law to runs, taken to the true optimum of its objective, with a certificate.

    starts   a grid over the exponents; for each the best positive coefficients of least squares, in
             closed form; then the local minima of the grid, and some of the rest
    polish   newton.solve, all starts at once (absolute.py for least absolute deviations)
    basins   the different minima that the starts ended in; the lowest is the fit

Invariant: a Fit says what it is worth. Nothing is called certified whose scaled gradient is above
1e-8, whose curvature is not positive, or that another start beats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from forescale.errors import UserError
from forescale.scaling.fitting.forms import Form, design
from forescale.scaling.fitting.least_absolute import SMOOTHED, certified, solve_absolute
from forescale.scaling.fitting.newton import TOLERANCE, Solved, Task, join, measured, solve
from forescale.scaling.fitting.objective import ROUNDING, Objective
from forescale.scaling.fitting.points import Array, Points

# Share of the loss that a term starts with at least. From the lower one it takes hundreds of steps
# back along a bent valley if the term is there after all; if it isn't, few but it lead to the end.
_BOLD, _FAINT = 0.2, 1e-4
_STARTS = 32
_SAME = 1e-6  # of the objective, relative, and
_APART = 1e-3  # of the internal parameters: two starts ended in one basin


@dataclass(frozen=True)
class Basin:
    """A minimum: its objective, its published parameters, and how many starts ended there."""

    objective: float
    values: dict[str, float]
    starts: int


@dataclass(frozen=True)
class Certificate:
    """scaled_gradient: 0 at a stationary point, see objective.py; curvature: positive at a minimum,
    see newton.Solved (a corner's margin for least absolute deviations); edges: parameters at an end
    of their range ("E at its least" means that E is gone); method: how it was polished; basins: the
    lowest first, those alone that passed; astray: starts that ended at no minimum; beaten: one of
    these ended lower than the lowest that is one."""

    scaled_gradient: float
    curvature: float
    edges: tuple[str, ...]
    method: str
    basins: tuple[Basin, ...] = ()
    astray: int = 0
    beaten: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it is not the optimum; empty for one."""
        found = []
        if not self.scaled_gradient <= TOLERANCE:
            found.append(f"the scaled gradient is {self.scaled_gradient:.1e}, over {TOLERANCE:.0e}")
        if not self.curvature > 0:
            found.append(f"the curvature is {self.curvature:.1e}: no minimum, or a flat one")
        if self.beaten:
            found.append("a start that came to no minimum ended lower")
        return tuple(found)

    @property
    def holds(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Fit:
    """values: the published parameters; loss weights: (n,). Built by `fit`."""

    form: Form
    points: Points
    objective: Objective
    weights: Array
    values: dict[str, float]
    value: float  # of the objective
    certificate: Certificate
    task: Task
    theta: Array  # (1, p)

    @property
    def vector(self) -> Array:
        """(p,), in the order of the form's symbols."""
        return self.form.vector(self.values)

    @cached_property
    def residuals(self) -> Array:
        """Of log loss, (n,)."""
        return np.log(self.points.loss) - self.form.evaluate(self.theta, self.task.at)[0][0]

    def predict(self, **columns: ArrayLike) -> Array:
        """Loss, (m,); see Form.predict."""
        return self.form.predict(self.values, **columns)


def fit(
    form: Form,
    points: Points,
    objective: Objective | None = None,
    weights: ArrayLike | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Fit:
    """weights: (n,), not negative, 1 each by default; fixed: published parameters to hold (a
    coefficient only together with its exponent). Raises UserError for data that can't tell the
    parameters, and for weights that are none."""
    goal = objective or Objective()
    task = task_of(form, points, goal, fixed or {})
    w = _weights(points, weights)
    y = np.log(points.loss)[None]
    _refuse_too_little(task, points, w)
    found = polish(task, y, w[None], starts(task, y, w[None], _BOLD))
    best, basins, astray, beaten = _basins(task, found, w)
    if not basins or beaten:
        found = join([found, polish(task, y, w[None], starts(task, y, w[None], _FAINT))])
        best, basins, astray, beaten = _basins(task, found, w)
    one = found.take(np.array([best]))
    certificate = _certificate(task, one, basins, astray, beaten)
    values = form.published(one.theta, task.at.centre)[0]
    named = dict(zip(form.symbols, map(float, values), strict=True))
    return Fit(form, points, goal, w, named, float(one.value[0]), certificate, task, one.theta)


def certify(
    form: Form,
    points: Points,
    values: Mapping[str, float] | ArrayLike,
    objective: Objective | None = None,
    weights: ArrayLike | None = None,
) -> tuple[float, Certificate]:
    """The objective and what there is to say of anybody's published parameters: whether they are a
    minimum of it. No other start is tried, so that `basins` is empty."""
    task = task_of(form, points, objective or Objective(), {})
    theta = form.internal(form.vector(values)[None], task.at.centre)
    w = _weights(points, weights)[None]
    look = certified if task.goal.delta == 0 else measured
    one = look(task, np.log(points.loss)[None], w, np.clip(theta, task.low, task.high))
    return float(one.value[0]), _certificate(task, one)


def polish(task: Task, y: Array, w: Array, start: Array) -> Solved:
    """From start (R, p) or (1, p) to the minimum near it, in the way that the objective asks."""
    return (solve_absolute if task.goal.delta == 0 else solve)(task, y, w, start)


def task_of(form: Form, points: Points, goal: Objective, fixed: Mapping[str, float]) -> Task:
    at = design(form, points)
    low, high = form.bounds(at, np.log(points.loss))
    if strange := set(fixed) - set(form.symbols):
        what = f"it has no {', '.join(sorted(strange))}"
        raise UserError(form.name, what, f"hold some of {', '.join(form.symbols)}")
    if fixed:
        held = np.array([float(fixed.get(s, np.nan)) for s in form.symbols])
        theta = form.internal(held[None], at.centre)[0]
        for i, s in enumerate(form.symbols):
            if s in fixed and np.isnan(theta[i]):
                raise UserError(form.name, f"{s} is held without its exponent", "hold both")
            if s in fixed:
                low[i] = high[i] = theta[i]
    return Task(form, at, goal, low, high)


def starts(task: Task, y: Array, w: Array, least: float = _FAINT) -> Array:
    """The profile grid's minima and the best and some others of it: (S, p). y, w: (1, n); least:
    share of the loss of any term."""
    form = task.form
    grid = _held_exponents(task)
    basis, power = form.basis(grid, task.at)
    target = np.exp(y / power[:, None])  # (G, n)
    relative = w if task.goal.on == "log" else w * np.exp(2 * y)
    coefficients = _nonnegative(basis / target[:, None], relative)
    level = np.median(target, axis=1)[:, None] / np.median(basis, axis=2)
    theta = form.assemble(grid, np.maximum(coefficients, least * level))
    theta = np.clip(theta, task.low, task.high)
    m, _ = form.evaluate(theta, task.at)
    r = y - m if task.goal.on == "log" else np.exp(y) - np.exp(m)
    value = task.goal.value(r, w)
    order = np.argsort(value)
    chosen = dict.fromkeys(order[:4].tolist())
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in grid.T], axis=1)
    chosen |= dict.fromkeys(i for i in order.tolist() if _is_lowest(value, ranks, i))
    chosen |= dict.fromkeys(order[:: max(1, len(order) // _STARTS)].tolist())
    return theta[list(chosen)[:_STARTS]]


def _held_exponents(task: Task) -> Array:
    """The grid (G, q), with exponents that are held at their value."""
    form = task.form
    grid = form.grid()
    probe = np.where(task.low == task.high, task.low, np.nan)
    held = form.published(probe[None], task.at.centre)[0]
    for i, s in enumerate(form.exponents):
        if not np.isnan(value := held[form.symbols.index(s)]):
            grid[:, i] = value
    return np.unique(grid, axis=0)


def _is_lowest(value: Array, ranks: Array, i: int) -> bool:
    """Whether none of a grid point's neighbours has a lower value. ranks: (G, q), of its places."""
    near = (np.abs(ranks - ranks[i]) <= 1).all(1)
    return bool(value[i] <= value[near].min())


def _nonnegative(basis: Array, weight: Array) -> Array:
    """Coefficients (G, K), none negative, that bring sum(c * basis) nearest to 1 by weighted least
    squares: the best of all subsets of the K terms, each in closed form. basis: (G, K, n)."""
    G, K, _ = basis.shape
    gram = (basis * weight[:, None]) @ basis.swapaxes(1, 2)
    right = (basis * weight[:, None]).sum(-1)
    best, lowest = np.zeros((G, K)), np.zeros(G)
    for k in range(1, K + 1):
        for subset in combinations(range(K), k):
            rows = np.array(subset)
            part = gram[:, rows[:, None], rows]
            size = np.sqrt(np.einsum("gii->gi", part))
            unit = part / (size[:, :, None] * size[:, None, :]) + 1e-13 * np.eye(k)
            c = np.linalg.solve(unit, (right[:, rows] / size)[:, :, None])[:, :, 0] / size
            error = -(c * right[:, rows]).sum(-1)  # less what every subset has
            better = (c >= 0).all(-1) & (error < lowest)
            lowest = np.where(better, error, lowest)
            full = np.zeros((G, K))
            full[:, rows] = c
            best = np.where(better[:, None], full, best)
    return best


def _basins(task: Task, found: Solved, w: Array) -> tuple[int, tuple[Basin, ...], int, bool]:
    """The place of the lowest, all minima from the lowest on, how many starts found none, and
    whether one of these ended lower still."""
    passed = (found.gradient <= TOLERANCE) & (found.curvature > 0)
    order = [i for i in np.argsort(found.value, kind="stable").tolist() if passed[i]]
    if not order:
        return int(np.nanargmin(found.value)), (), len(passed), False
    exact = float(task.goal.value(np.full_like(w, ROUNDING), w))
    groups: list[list[int]] = []
    for i in order:
        for group in groups:
            first = group[0]
            near = found.value[i] <= found.value[first] * (1 + _SAME) + exact
            # Two of one objective and other parameters: the runs can't tell them apart.
            if near and np.abs(found.theta[i] - found.theta[first]).max() < _APART:
                group.append(i)
                break
        else:
            groups.append([i])
    values = task.form.published(found.theta, task.at.centre)
    basins = tuple(
        Basin(
            float(found.value[g[0]]),
            dict(zip(task.form.symbols, map(float, values[g[0]]), strict=True)),
            len(g),
        )
        for g in groups
    )
    lower = found.value < found.value[order[0]] * (1 - _SAME) - exact
    return order[0], basins, int((~passed).sum()), bool((lower & ~passed).any())


def _certificate(
    task: Task, one: Solved, basins: tuple[Basin, ...] = (), astray: int = 0, beaten: bool = False
) -> Certificate:
    ends = {-1: "least", 1: "greatest"}
    edges = zip(task.form.symbols, one.edge[0], strict=True)
    method = f"damped Newton on {task.goal}"
    if task.goal.delta == 0:
        method = f"smoothed down to {SMOOTHED[-1]:.0e}, then onto a kink of {task.goal}"
    return Certificate(
        float(one.gradient[0]),
        float(one.curvature[0]),
        tuple(f"{s} at its {ends[int(e)]}" for s, e in edges if e),
        method,
        basins,
        astray,
        beaten,
    )


def _weights(points: Points, given: ArrayLike | None) -> Array:
    w = np.ones(len(points)) if given is None else np.array(given, dtype=float)
    if w.shape != (len(points),) or not np.isfinite(w).all() or (w < 0).any():
        what = "the weights are not one finite number a run, zero or more"
        raise UserError(points.where, what, "leave them out, or give one a run")
    return w


def _refuse_too_little(task: Task, points: Points, w: Array) -> None:
    form, at = task.form, task.at
    free = int((task.low < task.high).sum())
    seen = np.stack([at.logs[c] for c in form.columns])[:, w > 0]
    different = np.unique(seen, axis=1).shape[1]
    if different < free:
        what = f"{different} different runs can't tell the {free} parameters of {form.name}"
        raise UserError(points.where, what, "add runs, or fit a law with fewer parameters")
    for c, x in zip(form.columns, seen, strict=True):
        if np.ptp(x) == 0 and c != "unique_tokens" and free == form.size:
            raise UserError(points.where, f"all runs have the same {c}", "add runs of another")
    if "unique_tokens" in form.columns and "tokens" in form.columns:
        repeats = points.log("tokens") > points.log("unique_tokens")
        if not repeats[w > 0].any():
            raise UserError(points.where, "no run repeats its data", "fit a law without repetition")
