"""IsoFLOP analysis: a parabola through the runs of each budget, a power law through the vertices.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 2: the optimal N and D without a law of the loss.

    kept     the runs of a budget near its lowest loss, because loss is no parabola in log N far off
    vertex   N* at the least of the parabola; D* at N*, by the runs' own line of log D over log N
    law      N*(C) and D*(C), C as the runs count it

Invariant: a budget whose parabola has no valid vertex is refused with the reason, never repaired;
the power law uses all the others. No convention of C is assumed: C, N and D are those of the runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from forescale.ground.errors import UserError
from forescale.scaling.fitting.points import Array, Points, near_best, spent

SPREAD = 0.05  # greatest spread of compute in a budget; more moves the loss as much as a parabola


@dataclass(frozen=True)
class Vertex:
    """The vertex of a budget's parabola, loss = floor + bend (log N - log N*)^2.

    budget: the mean C of its runs, FLOPs; runs: the number that the parabola is fitted to; sizes:
    their least and greatest N; parameters, tokens: N* and D*, at the least loss; path: polynomial
    of log D of the runs in log N - log N*, highest power first.
    """

    budget: float
    runs: int
    sizes: tuple[float, float]
    parameters: float
    tokens: float
    floor: float
    bend: float
    path: tuple[float, ...]


@dataclass(frozen=True)
class Refusal:
    """A budget without a valid vertex, and the reason."""

    budget: float
    runs: int
    why: str


@dataclass(frozen=True)
class Law:
    """A power law through the vertices, N*(C) = k C^a or D*(C) = k C^a. draws: resampled log k and
    a, (R, 2), once by residuals of losses around the parabolas, and once by residuals of vertices
    around the law; empty if there are too few residuals."""

    k: float
    a: float
    draws: tuple[Array, Array]

    def __call__(self, flops: ArrayLike) -> Array:
        """Return N* or D* at budgets of FLOPs."""
        return self.k * np.asarray(flops, dtype=float) ** self.a

    def interval(self, level: float = 0.95, flops: ArrayLike | None = None) -> Array:
        """Return the percentile interval of N* or D* at `flops`, (2, m), or of (k, a), (2, 2).

        On each side it is the wider one of both kinds of draws: the noise of the losses alone
        misses the error of the parabolas, and a few vertices alone have few distinct draws. NaN if
        there are neither.
        """
        tail = 50 * (1 - level)
        ends = []
        for draws in self.draws:
            if not len(draws):
                continue
            log_k, a = draws[:, 0], draws[:, 1]
            if flops is None:
                values = np.stack((np.exp(log_k), a), axis=1)
            else:
                values = np.exp(log_k[:, None] + a[:, None] * np.log(np.atleast_1d(flops)))
            ends.append(np.percentile(values, [tail, 100 - tail], axis=0))
        if not ends:
            return np.full((2, 2 if flops is None else np.size(flops)), np.nan)
        low, high = np.array(ends).swapaxes(0, 1)
        return np.stack((low.min(0), high.max(0)))


@dataclass(frozen=True)
class IsoFlop:
    """The vertices and refusals of all budgets; parameters, tokens: the laws of N* and D*."""

    vertices: tuple[Vertex, ...]
    refusals: tuple[Refusal, ...]
    parameters: Law
    tokens: Law


def isoflop(
    points: Points, budgets: ArrayLike, near: float | None = None, count: int = 2000, seed: int = 0
) -> IsoFlop:
    """Return the isoFLOP analysis of runs with N and D.

    budgets: the nominal budget of each run, (n,). near: the parabolas are fitted to the runs that
    `near_best` keeps, and to the sizes beside the best one. Raises UserError, with every refusal,
    if fewer than two budgets have a vertex.
    """
    x, z, cost = points.log("parameters"), points.log("tokens"), spent(points)
    named = np.asarray(budgets, dtype=float)
    if named.shape != cost.shape or not (np.isfinite(named) & (named > 0)).all():
        raise UserError(points.where, "a budget is missing", "give every run one, in FLOPs")
    groups = [(float(b), np.flatnonzero(named == b)) for b in np.unique(named)]
    vertices, refusals, fits = [], [], []
    for budget, rows in groups:
        mask = near_best(points.loss[rows], np.zeros(len(rows)), near)
        # A parabola needs runs on both sides: the sizes beside the best one count at any distance.
        sizes = np.unique(x[rows])
        best = int(np.searchsorted(sizes, x[rows][np.argmin(points.loss[rows])]))
        rows = rows[mask | np.isin(x[rows], sizes[max(0, best - 1) : best + 2])]
        result = vertex(budget, x[rows], z[rows], points.loss[rows], cost[rows])
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            vertices.append(result)
            fits.append((x[rows], points.loss[rows]))
    if len(vertices) < 2:
        whys = "; ".join(f"{r.budget:.2g} FLOPs: {r.why}" for r in refusals)
        problem = f"{len(vertices)} of {len(groups)} budgets have a vertex ({whys})"
        raise UserError(points.where, problem, "add runs on both sides of each optimum")
    c, optima = np.log([v.budget for v in vertices]), np.log([v.parameters for v in vertices])
    rng = np.random.default_rng(seed)
    drawn = _redrawn(fits, count, rng)
    parameters = _law(c, optima, drawn, count, rng)
    away = (drawn - optima).T
    fed = np.stack([np.polyval(v.path, a) for v, a in zip(vertices, away, strict=True)], 1)
    tokens = _law(c, np.log([v.tokens for v in vertices]), fed, count, rng)
    return IsoFlop(tuple(vertices), tuple(refusals), parameters, tokens)


def vertex(budget: float, x: Array, z: Array, loss: Array, flops: Array) -> Vertex | Refusal:
    """Return the vertex of one budget, or the refusal. budget: as named; x, z: log N and log D;
    flops: C; all but the budget: (m,)."""

    def no(why: str) -> Refusal:
        return Refusal(budget, len(x), why)

    low, high = float(flops.min()), float(flops.max())
    if high > low * (1 + SPREAD):
        return no(f"its runs range from {low:.3g} to {high:.3g} FLOPs, which is not one budget")
    if (sizes := len(np.unique(x))) < 3:
        return no(f"{sizes} sizes don't determine a parabola")
    bend, slope, level = _parabola(x - x.mean(), loss[None])[0]
    if not bend > 1e-12 * np.abs(loss).max():
        return no("its parabola has no minimum")
    at = float(x.mean() - slope / (2 * bend))
    n = float(np.exp(at))
    if not x.min() <= at <= x.max():
        where = "below" if at < x.mean() else "above"
        return no(f"the vertex, at {n:.3g} parameters, is {where} all of its sizes")
    if x[np.argmin(loss)] in (x.min(), x.max()):
        return no("the lowest loss is at its smallest or largest size")
    path = np.polyfit(x - at, z, 2 if sizes > 3 else 1)  # C/ND may change with N
    mean, (least, most) = float(np.exp(np.log(flops).mean())), np.exp([x.min(), x.max()])
    return Vertex(
        mean, len(x), (float(least), float(most)), n, float(np.exp(path[-1])),
        float(level - slope**2 / (4 * bend)), float(bend), tuple(map(float, path)),
    )  # fmt: skip


def _parabola(x: Array, loss: Array) -> Array:
    """Return coefficients, (R, 3), from the square down, of losses, (R, m), by least squares."""
    return loss @ np.linalg.pinv(np.vander(x, 3)).T


def _redrawn(fits: Sequence[tuple[Array, Array]], count: int, rng: np.random.Generator) -> Array:
    """Return log N* of each budget with resampled losses, (R, B). NaN if the parabola has no vertex
    within the sizes; (0, B) if no budget has more than three sizes. Residuals are pooled over the
    budgets and divided by the root of 1 - leverage (Davison and Hinkley 1997, 6.9)."""
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
    optima = np.empty((count, len(fits)))
    for b, (x, _) in enumerate(fits):
        losses = smooth[b] + rng.choice(noise, size=(count, len(x)))
        bend, slope, _ = _parabola(x - x.mean(), losses).T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x.mean() - slope / (2 * bend)
        optima[:, b] = np.where((bend > 0) & (at >= x.min()) & (at <= x.max()), at, np.nan)
    return optima


def _law(c: Array, y: Array, drawn: Array, count: int, rng: np.random.Generator) -> Law:
    """Fit the line y = log k + a c through the vertices, and through the resampled ones."""
    centre = float(c.mean())
    X = np.stack((np.ones_like(c), c - centre), axis=1)
    hat = X @ np.linalg.pinv(X)
    left = 1 - np.diag(hat)
    rest = y - hat @ y
    level, a = np.linalg.pinv(X) @ y
    valid = np.isfinite(drawn)
    w, filled = valid.astype(float), np.where(valid, drawn, 0.0)
    by_runs = _lines(X, filled[valid.sum(1) > 1], w[valid.sum(1) > 1])
    by_vertices = np.empty((0, 2))
    if len(c) > 3:
        noise = rest / np.sqrt(left)
        noise = noise - noise.mean()
        again = hat @ y + rng.choice(noise, size=(count, len(c)))
        by_vertices = _lines(X, again, np.ones_like(again))
    draws = [d - np.outer(d[:, 1], [centre, 0]) for d in (by_runs, by_vertices)]
    return Law(float(np.exp(level - a * centre)), float(a), (draws[0], draws[1]))


def _lines(X: Array, y: Array, w: Array) -> Array:
    """Return level and slope, (R, 2), of y, (R, B), by weighted least squares."""
    gram = np.einsum("rb,bi,bj->rij", w, X, X)
    return np.linalg.solve(gram, np.einsum("rb,bi->ri", w * y, X)[:, :, None])[:, :, 0]
