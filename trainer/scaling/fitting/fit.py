"""Fit a law to runs: the global minimum of the objective, with a certificate.

    starts   a grid over the exponents, each with its best positive coefficients of least squares in
             closed form; of these the local minima of the grid, the best, and some others
    solve    newton.solve from all starts at once
    minima   the different local minima that the starts reached; the lowest is the fit

Of more than a thousand runs, a thousand make the starts and are solved first.

Invariant: every Fit holds a certificate. It fails if the scaled gradient is above 1e-8, if the
curvature is not positive, or if a start ended lower without reaching a minimum.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from forescale.ground.errors import UserError
from forescale.scaling.fitting.forms import Design, Form, design
from forescale.scaling.fitting.newton import TOLERANCE, Minimisation, Solved, solve
from forescale.scaling.fitting.objective import ROUNDING, Objective
from forescale.scaling.fitting.points import SETTINGS, Array, Points, repeats

# Least share of the loss that a term starts with. If the term exists, starts with the lower share
# need hundreds of steps along a bent valley; if not, few others converge.
_BOLD, _FAINT = 0.2, 1e-4
_STARTS = 32
_MANY = 1000  # runs that the starts come from at most
# Two starts reached the same minimum if they differ by less than these.
_SAME = 1e-6  # objective, relative
_APART = 1e-3  # internal parameters


@dataclass(frozen=True)
class Minimum:
    """A local minimum: objective, published parameters, number of starts that reached it."""

    objective: float
    values: dict[str, float]
    starts: int


@dataclass(frozen=True)
class Certificate:
    """Evidence that a point is the global minimum of the objective.

    scaled_gradient: 0 at a stationary point, see objective.py; curvature: positive at a minimum,
    see newton.Solved; edges: parameters at an end of their range ("E at its least" means that the
    term E is absent); method: how it was solved; minima: the local minima, lowest first;
    failed_starts: number of starts that reached none; undercut: True if a failed start ended below
    the lowest minimum.
    """

    scaled_gradient: float
    curvature: float
    edges: tuple[str, ...]
    method: str
    minima: tuple[Minimum, ...] = ()
    failed_starts: int = 0
    undercut: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """Return the reasons why the point is not certified; empty if it is."""
        problems = []
        if not self.scaled_gradient <= TOLERANCE:
            value = f"{self.scaled_gradient:.1e}, above {TOLERANCE:.0e}"
            problems.append(f"the scaled gradient is {value}")
        if not self.curvature > 0:
            problems.append(f"the curvature is {self.curvature:.1e}: no minimum, or a flat one")
        if self.undercut:
            problems.append("a start ended lower without reaching a minimum")
        return tuple(problems)

    @property
    def holds(self) -> bool:
        """Return True if the point is certified."""
        return not self.problems


@dataclass(frozen=True)
class Fit:
    """A fitted law, built by `fit`. weights: (n,); values: published parameters; value: the
    objective; theta: internal, (1, p)."""

    form: Form
    points: Points
    objective: Objective
    weights: Array
    values: dict[str, float]
    value: float
    certificate: Certificate
    task: Minimisation
    theta: Array

    @property
    def vector(self) -> Array:
        """Return the published parameters in the order of the form's symbols, (p,)."""
        return self.form.vector(self.values)

    @cached_property
    def residuals(self) -> Array:
        """Return observed minus fitted log loss of the runs, (n,)."""
        fitted = self.form.evaluate(self.theta, self.task.at)[0][0]
        return np.log(self.points.loss) - fitted

    def predict(self, **columns: ArrayLike) -> Array:
        """Return the loss of m runs, (m,); see Form.predict."""
        return self.form.predict(self.values, **columns)


def fit(
    form: Form, points: Points, objective: Objective | None = None, weights: ArrayLike | None = None
) -> Fit:
    """Fit a law to runs. weights: (n,), not negative, 1 each by default. Raises UserError if the
    runs don't determine the parameters, or if the weights are invalid."""
    goal = objective or Objective()
    task = minimisation_of(form, points, goal)
    w = np.ones(len(points)) if weights is None else np.array(weights, dtype=float)
    if w.shape != (len(points),) or not np.isfinite(w).all() or (w < 0).any():
        problem = "the weights are not one finite number per run, zero or more"
        raise UserError(points.where, problem, "leave them out, or give one per run")
    y = np.log(points.loss)[None]
    _refuse_underdetermined(task, points, w)
    solved = _searched(task, y, w[None], _BOLD)
    best, certificate = certified(task, solved, w)
    if not certificate.minima or certificate.undercut or certificate.edges:
        solved = Solved.join([solved, _searched(task, y, w[None], _FAINT)])
        best, certificate = certified(task, solved, w)
    theta = solved.theta[[best]]
    values = dict(zip(form.symbols, form.published(theta, task.at.centre)[0].tolist(), strict=True))
    return Fit(form, points, goal, w, values, float(solved.value[best]), certificate, task, theta)


def _searched(task: Minimisation, y: Array, w: Array, least: float) -> Solved:
    """Return what the starts of the profile grid reach. y, w: (1, n)."""
    first = starts(task, y, w, least)
    if y.shape[1] <= _MANY:
        return solve(task, y, w, first)
    near = solve(*_thinned(task, y, w), first).theta
    _, one, which = np.unique(near.round(6), axis=0, return_index=True, return_inverse=True)
    return solve(task, y, w, near[one]).take(which)


def _thinned(task: Minimisation, y: Array, w: Array) -> tuple[Minimisation, Array, Array]:
    """Return the task, losses and weights of `_MANY` runs, spread evenly over the losses."""
    order = np.flatnonzero(w[0] > 0)
    order = order[np.argsort(y[0, order], kind="stable")]
    chosen = order[np.linspace(0, len(order) - 1, min(_MANY, len(order))).astype(int)]
    at = Design({c: x[chosen] for c, x in task.at.logs.items()}, task.at.centre)
    return replace(task, at=at), y[:, chosen], w[:, chosen]


def minimisation_of(form: Form, points: Points, goal: Objective) -> Minimisation:
    """Return the optimisation task of a fit."""
    at = design(form, points)
    return Minimisation(form, at, goal, *form.bounds(at, np.log(points.loss)))


def starts(task: Minimisation, y: Array, w: Array, least: float = _FAINT) -> Array:
    """Return starts from the profile grid, (S, p): its best points, its local minima, some others.
    y, w: (1, n); least: the least share of the loss that a term starts with."""
    if y.shape[1] > _MANY:
        task, y, w = _thinned(task, y, w)
    form = task.form
    grid = form.grid()
    basis, power = form.basis(grid, task.at)
    target = np.exp(y / power[:, None])  # (G, n)
    relative = w if task.goal.on == "log" else w * np.exp(2 * y)
    coefficients = _nonnegative(basis / target[:, None], relative)
    level = np.median(target, axis=1)[:, None] / np.median(basis, axis=2)
    theta = form.assemble(grid, np.maximum(coefficients, least * level))
    theta = np.clip(theta, task.low, task.high)
    m, _ = form.evaluate(theta, task.at)
    r = y - m if task.goal.on == "log" else np.exp(y) - np.exp(m)
    value = task.goal.value(r, w)  # of each grid point
    order = np.argsort(value)
    chosen = dict.fromkeys(order[:4].tolist())
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in grid.T], axis=1)
    for i in order.tolist():
        neighbours = (np.abs(ranks - ranks[i]) <= 1).all(1)
        if value[i] <= value[neighbours].min():
            chosen[i] = None
    chosen |= dict.fromkeys(order[:: max(1, len(order) // _STARTS)].tolist())
    return theta[list(chosen)[:_STARTS]]


def _nonnegative(basis: Array, weight: Array) -> Array:
    """Return coefficients >= 0, (G, K), with sum(c * basis) nearest to 1 by weighted least squares.
    Tries all subsets of the K terms, each in closed form. basis: (G, K, n)."""
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
            error = -(c * right[:, rows]).sum(-1)  # without the part common to all subsets
            better = (c >= 0).all(-1) & (error < lowest)
            lowest = np.where(better, error, lowest)
            full = np.zeros((G, K))
            full[:, rows] = c
            best = np.where(better[:, None], full, best)
    return best


def certified(task: Minimisation, solved: Solved, w: Array) -> tuple[int, Certificate]:
    """Return the index of the lowest minimum that the starts reached, and its certificate. w: (n,).
    Without a minimum, it is the lowest point."""
    is_minimum, symbols = solved.is_minimum, task.form.symbols
    order = [i for i in np.argsort(solved.value, kind="stable").tolist() if is_minimum[i]]
    best = order[0] if order else int(np.nanargmin(solved.value))
    exact = float(task.goal.value(np.full_like(w, ROUNDING), w))
    groups: list[list[int]] = []
    for i in order:
        for group in groups:
            first = group[0]
            near = solved.value[i] <= solved.value[first] * (1 + _SAME) + exact
            # Minima of equal objective and other parameters stay apart: the runs fit both.
            if near and np.abs(solved.theta[i] - solved.theta[first]).max() < _APART:
                group.append(i)
                break
        else:
            groups.append([i])
    values = task.form.published(solved.theta, task.at.centre)
    minima = tuple(
        Minimum(
            float(solved.value[i]), dict(zip(symbols, values[i].tolist(), strict=True)), len(group)
        )
        for group in groups
        for i in group[:1]
    )
    lower = solved.value < solved.value[best] * (1 - _SAME) - exact
    undercut = bool(order) and bool((lower & ~is_minimum).any())
    ends = {-1: "least", 1: "greatest"}
    edges = zip(symbols, solved.edge[best], strict=True)
    return best, Certificate(
        float(solved.gradient[best]), float(solved.curvature[best]),
        tuple(f"{s} at its {ends[int(e)]}" for s, e in edges if e),
        f"damped Newton on {task.goal}", minima, int((~is_minimum).sum()), undercut,
    )  # fmt: skip


def _refuse_underdetermined(task: Minimisation, points: Points, w: Array) -> None:
    """Raise UserError if the runs can't determine the parameters."""
    form, at = task.form, task.at
    columns = np.stack([at.logs[c] for c in form.columns])[:, w > 0]
    different = np.unique(columns, axis=1).shape[1]
    if different < form.size:
        problem = (
            f"{different} different runs don't determine the {form.size} parameters of {form.name}"
        )
        raise UserError(points.where, problem, "add runs, or fit a law with fewer parameters")
    if np.ptp(points.loss[w > 0]) == 0:
        problem = "all runs have the same loss, which determines no law"
        raise UserError(points.where, problem, "check its column; add runs with other losses")
    for c, x in zip(form.columns, columns, strict=True):
        if np.ptp(x) == 0 and c != "unique_tokens":
            todo = "add runs with others"
            if c in SETTINGS:
                todo += ", or fit a law without it, such as form=chinchilla"
            raise UserError(points.where, f"all runs have the same {c}", todo)
    if "unique_tokens" in form.columns and not repeats(points)[w > 0].any():
        problem = "no run repeats its data"
        raise UserError(points.where, problem, "fit a law without repeated data")
