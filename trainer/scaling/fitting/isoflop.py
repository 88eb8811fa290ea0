"""The optimum without a law of the loss: a parabola through the runs of each budget, and a power
law through the vertices (Hoffmann et al. 2022, arXiv 2203.15556, approach 2).

Invariant: a budget whose parabola says nothing is refused with the reason, never bent into shape;
the power law goes through all the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from forescale.errors import UserError
from forescale.scaling.fitting.points import Array, Points

SPREAD = 0.05  # of the runs of a budget: 5 % of compute move the loss as much as a parabola does


@dataclass(frozen=True)
class Vertex:
    """Of the budget (FLOPs) of some runs: N* and D* at the least loss of the parabola
    loss = floor + bend (log N - log N*)^2."""

    budget: float
    runs: int
    parameters: float
    tokens: float
    floor: float
    bend: float


@dataclass(frozen=True)
class Refusal:
    """A budget without a vertex, and why."""

    budget: float
    runs: int
    why: str


@dataclass(frozen=True)
class Law:
    """N*(C) = k C^a or D*(C) = k C^a. scatter: of the vertices around it, standard deviation of the
    logarithm; draws: (R, 2) of log k and a, by losses drawn anew around the parabolas, and by
    vertices drawn anew around the law (empty where too few say how much they scatter)."""

    k: float
    a: float
    scatter: float
    centre: float  # of log C
    draws: tuple[Array, Array]

    def __call__(self, flops: ArrayLike) -> Array:
        return self.k * np.asarray(flops, dtype=float) ** self.a

    def interval(self, level: float = 0.95, flops: ArrayLike | None = None) -> Array:
        """The percentile interval, (2, ...), of what it says at `flops`; without, of (k, a). The
        wider of both kinds of draws on each side: the noise of the losses alone misses what the
        parabola gets wrong, a handful of vertices alone has few words. NaN if there is neither."""
        tail = 50 * (1 - level)
        ends = []
        for draws in self.draws:
            if not len(draws):
                continue
            log_k, a = draws[:, 0], draws[:, 1]
            if flops is None:
                found = np.stack((np.exp(log_k), a), axis=1)
            else:
                found = np.exp(log_k[:, None] + a[:, None] * np.log(np.atleast_1d(flops)))
            ends.append(np.percentile(found, [tail, 100 - tail], axis=0))
        if not ends:
            return np.full((2, 2 if flops is None else np.size(flops)), np.nan)
        low, high = np.array(ends).swapaxes(0, 1)
        return np.stack((low.min(0), high.max(0)))


@dataclass(frozen=True)
class IsoFlop:
    """parameters, tokens: the laws of N* and D*."""

    vertices: tuple[Vertex, ...]
    refusals: tuple[Refusal, ...]
    parameters: Law
    tokens: Law


def isoflop(
    points: Points,
    budgets: ArrayLike | None = None,
    per_parameter_token: float = 6.0,
    count: int = 2000,
    seed: int = 0,
) -> IsoFlop:
    """budgets: (n,), the nominal one of each run; without, runs are grouped by what they spent.
    That is points.flops or, where there is none, per_parameter_token N D. Raises UserError, with
    every refusal, if fewer than two budgets have a vertex."""
    x, spent = points.log("parameters"), _spent(points, per_parameter_token)
    groups = _grouped(points, spent, budgets)
    vertices, refusals, fits = [], [], []
    for budget, rows in groups:
        found = vertex(budget, x[rows], points.loss[rows], spent[rows], per_parameter_token)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            vertices.append(found)
            fits.append((x[rows], points.loss[rows]))
    if len(vertices) < 2:
        whys = "; ".join(f"{r.budget:.2g} FLOPs: {r.why}" for r in refusals)
        what = f"{len(vertices)} of {len(groups)} budgets have a vertex ({whys})"
        raise UserError(points.where, what, "add runs on both sides of each optimum")
    c = np.log([v.budget for v in vertices])
    rng = np.random.default_rng(seed)
    drawn = _redrawn(fits, count, rng)
    laws = []
    for sign, start in ((1.0, np.zeros_like(c)), (-1.0, c - np.log(per_parameter_token))):
        y = start + sign * np.log([v.parameters for v in vertices])
        laws.append(_law(c, y, start + sign * drawn, count, rng))
    return IsoFlop(tuple(vertices), tuple(refusals), *laws)


def _spent(points: Points, per: float) -> Array:
    if points.flops is not None:
        return points.flops
    return per * np.exp(points.log("parameters") + points.log("tokens"))


def _grouped(points: Points, spent: Array, budgets: ArrayLike | None) -> list[tuple[float, Array]]:
    if budgets is not None:
        named = np.asarray(budgets, dtype=float)
        if named.shape != spent.shape or not (np.isfinite(named) & (named > 0)).all():
            raise UserError(points.where, "a budget is missing", "give every run its FLOPs")
        return [(float(b), np.flatnonzero(named == b)) for b in np.unique(named)]
    order = np.argsort(spent, kind="stable")
    breaks = np.flatnonzero(np.diff(np.log(spent[order])) > np.log1p(SPREAD)) + 1
    return [(float(np.exp(np.log(spent[r]).mean())), r) for r in np.split(order, breaks)]


def vertex(budget: float, x: Array, loss: Array, spent: Array, per: float) -> Vertex | Refusal:
    """x: log N, (m,)."""

    def no(why: str) -> Refusal:
        return Refusal(budget, len(x), why)

    low, high = float(spent.min()), float(spent.max())
    if high > low * (1 + SPREAD):
        return no(f"its runs spent {low:.3g} to {high:.3g} FLOPs: budgets were rounded together")
    if len(np.unique(x)) < 3:
        return no(f"{len(np.unique(x))} sizes make no parabola")
    bend, slope, level = _parabola(x - x.mean(), loss[None])[0]
    if not bend > 1e-12 * np.abs(loss).max():
        return no("its parabola has no lowest point")
    at = -slope / (2 * bend)
    n = float(np.exp(at + x.mean()))
    if not x.min() <= at + x.mean() <= x.max():
        where = "below" if at < 0 else "above"
        return no(f"the vertex, at {n:.3g} parameters, is {where} all of its runs")
    if len(best := np.flatnonzero(loss == loss.min())) and x[best[0]] in (x.min(), x.max()):
        return no("the lowest loss is at the edge of its sizes")
    mean = float(np.exp(np.log(spent).mean()))
    return Vertex(mean, len(x), n, mean / (per * n), level - slope**2 / (4 * bend), float(bend))


def _parabola(x: Array, loss: Array) -> Array:
    """(R, 3), from the square down, of losses (R, m) by least squares."""
    return loss @ np.linalg.pinv(np.vander(x, 3)).T


def _redrawn(fits: Sequence[tuple[Array, Array]], count: int, rng: np.random.Generator) -> Array:
    """log N* of each budget with its losses drawn anew, (R, B), NaN where the parabola has none or
    has it outside; (0, B) where no budget has more than three sizes. Residuals are pooled over the
    budgets and freed of what their own parabola took of them (Davison and Hinkley 1997, 6.9)."""
    pool, smooth = [], []
    for x, loss in fits:
        V = np.vander(x - x.mean(), 3)
        hat = V @ np.linalg.pinv(V)
        smooth.append(hat @ loss)
        left = 1 - np.diag(hat)
        pool.append(((loss - hat @ loss)[left > 1e-6]) / np.sqrt(left[left > 1e-6]))
    noise = np.concatenate(pool)
    if len(noise) < 3:
        return np.empty((0, len(fits)))
    noise = noise - noise.mean()
    found = np.empty((count, len(fits)))
    for b, (x, _) in enumerate(fits):
        losses = smooth[b] + rng.choice(noise, size=(count, len(x)))
        bend, slope, _ = _parabola(x - x.mean(), losses).T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x.mean() - slope / (2 * bend)
        found[:, b] = np.where((bend > 0) & (at >= x.min()) & (at <= x.max()), at, np.nan)
    return found


def _law(c: Array, y: Array, drawn: Array, count: int, rng: np.random.Generator) -> Law:
    """The line y = log k + a c through the vertices, and through their redrawn kin."""
    centre = float(c.mean())
    X = np.stack((np.ones_like(c), c - centre), axis=1)
    hat = X @ np.linalg.pinv(X)
    left = 1 - np.diag(hat)
    rest = y - hat @ y
    level, a = np.linalg.pinv(X) @ y
    kept = np.isfinite(drawn)
    w, filled = kept.astype(float), np.where(kept, drawn, 0.0)
    by_runs = _lines(X, filled[kept.sum(1) > 1], w[kept.sum(1) > 1])
    by_vertices = np.empty((0, 2))
    if len(c) > 3:
        noise = rest / np.sqrt(left)
        noise = noise - noise.mean()
        again = hat @ y + rng.choice(noise, size=(count, len(c)))
        by_vertices = _lines(X, again, np.ones_like(again))
    draws = [d - np.outer(d[:, 1], [centre, 0]) for d in (by_runs, by_vertices)]
    free = max(len(c) - 2, 1)
    scatter = float(np.sqrt((rest**2).sum() / free))
    return Law(float(np.exp(level - a * centre)), float(a), scatter, centre, (draws[0], draws[1]))


def _lines(X: Array, y: Array, w: Array) -> Array:
    """(R, 2) of level and slope by weighted least squares of (R, B)."""
    gram = np.einsum("rb,bi,bj->rij", w, X, X)
    return np.linalg.solve(gram, np.einsum("rb,bi->ri", w * y, X)[:, :, None])[:, :, 0]
