"""Learning rates by trial: the best of a cross, what is lost beside it, and the rule for sizes and
budgets that nobody tried.

Invariant: a best learning rate has worse ones on both sides. Where the best is at the edge of what
was tried, that is said (`inside`), and `wider` names the rate to try next; it is never taken for an
optimum.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from forescale.scaling.design.shapes import Rule

_SLOPE, _NOISE = 0.3, 0.3  # standard deviations: of the exponents of N and D; of a log rate found
_BEYOND = 2.0  # times the highest rate found: no rule goes further


@dataclass(frozen=True)
class Tuned:
    """learning_rate: the best, by a parabola in its logarithm; gap: how far the best of the runs is
    above that, in log loss (0 at an edge); inside: whether rates on both sides were worse; tried:
    lowest and highest; bend: of the parabola of log loss, over `ends`, None without one."""

    learning_rate: float
    gap: float
    inside: bool
    tried: tuple[float, float] = (math.nan, math.nan)
    bend: float | None = None
    ends: tuple[float, float] | None = None

    def wider(self, factor: float) -> float | None:
        """The rate to try next where the best is at an edge."""
        if self.inside:
            return None
        low, high = self.tried
        return low / factor if self.learning_rate == low else high * factor


def tuned(rates: Sequence[float], losses: Sequence[float]) -> Tuned:
    """Of three or more runs; of the parabola through the best of them and its neighbours, and the
    best itself where that has no lowest point between. A loss that is no number is worse than
    all others."""
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, dtype=float)[order]), np.asarray(losses, dtype=float)[order]
    y = np.log(np.where(np.isfinite(y), y, np.inf))
    best, sorted_rates = int(np.argmin(y)), sorted(map(float, rates))
    own, tried = sorted_rates[best], (sorted_rates[0], sorted_rates[-1])
    near = slice(first := min(max(best - 1, 0), len(x) - 3), first + 3)
    if not np.isfinite(y[near]).all():
        return Tuned(own, 0.0, 0 < best < len(x) - 1, tried)
    bend, slope, _ = np.polyfit(x[near] - x[best], y[near], 2)
    at = -slope / (2 * bend) if bend > 0 else np.inf
    if not x[near][0] < x[best] + at < x[near][-1]:
        return Tuned(own, 0.0, False, tried)
    ends = sorted_rates[near.start], sorted_rates[near.stop - 1]
    gap = float(bend * at**2)
    return Tuned(float(np.exp(x[best] + at)), gap, True, tried, float(bend), ends)


@dataclass(frozen=True)
class Basin:
    """Of a cross of learning rates and batches. inside: whether the best lies within what was
    tried; else learning_rate and batch are those of the best run, and `edges` says in which it is
    at an end. gap: how far the best run is above the surface's lowest point, in log loss; 0 where
    there is none."""

    learning_rate: float
    batch: float
    inside: bool
    edges: tuple[str, ...]
    gap: float


def basin(rates: Sequence[float], batches: Sequence[float], losses: Sequence[float]) -> Basin:
    """The lowest point of a quadratic surface of log loss in log rate and log batch, by least
    squares through all runs that did not diverge; at one learning rate, of a parabola in the batch.
    Without such a point the best run, and what it is at the edge of."""
    x, y = np.log(np.asarray(rates, float)), np.log(np.asarray(batches, float))
    z = np.asarray(losses, float)
    z = np.log(np.where(np.isfinite(z), z, np.inf))
    best = int(np.argmin(z))
    varied = {"learning rate": x, "batch": y} if np.ptp(x) else {"batch": y}
    edges = tuple(name for name, v in varied.items() if v[best] in (v.min(), v.max()))
    own = Basin(float(rates[best]), float(batches[best]), not edges, edges, 0.0)
    if edges:
        return own
    if not np.ptp(x):
        line = tuned(batches, losses)
        return Basin(float(rates[best]), line.learning_rate, True, (), line.gap)
    a, b, kept = x - x[best], y - y[best], np.isfinite(z)
    X = np.stack((np.ones_like(a), a, b, a * a, a * b, b * b), axis=1)[kept]
    if np.linalg.matrix_rank(X) < X.shape[1]:
        return own
    level, p, q, r, s, t = np.linalg.lstsq(X, z[kept], rcond=None)[0]
    bend = np.array([[2 * r, s], [s, 2 * t]])
    if not (np.linalg.eigvalsh(bend) > 0).all():
        return own
    at = -np.linalg.solve(bend, [p, q])
    if not all(v.min() <= d <= v.max() for v, d in zip((a, b), at, strict=True)):
        return own
    lowest = level + np.array([p, q]) @ at / 2
    rate, batch = np.exp(x[best] + at[0]), np.exp(y[best] + at[1])
    return Basin(float(rate), float(batch), True, (), max(0.0, float(level - lowest)))


def best_rates(runs: Iterable[tuple[int, float, float]]) -> tuple[dict[int, Tuned], float]:
    """Of (N, learning rate, loss): the best of each N, and the largest gap."""
    tried: dict[int, list[tuple[float, float]]] = {}
    for n, rate, loss in runs:
        tried.setdefault(n, []).append((rate, loss))
    best = {n: tuned([r for r, _ in each], [y for _, y in each]) for n, each in tried.items()}
    return best, max((t.gap for t in best.values()), default=0.0)


def between(rates: Mapping[int, Tuned], parameters: float) -> float:
    """The learning rate of a size between two, along a line of log rate on log N."""
    n = sorted(rates)
    logs = [math.log(rates[k].learning_rate) for k in n]
    return float(np.exp(np.interp(math.log(parameters), np.log(n), logs)))


def learnt(rule: Rule, found: Sequence[tuple[float, float, float]]) -> Rule:
    """The rule with its learning rate by (non-embedding N, D, best rate) of what was tried so far:
    log rate is a line on log N and log D, whose exponents are held near the rule's where that
    covers all that was tried, else near 0 (Gaussian, standard deviation 0.3 each, the noise of a
    log rate 0.3): few crosses move the level, many the exponents."""
    if not found:
        return rule
    n, d, rates = np.log(np.array(found, dtype=float)).T
    covered = all(rule.covers(size, tokens) for size, tokens, _ in found)
    prior = np.array(rule.rate[1:]) if covered else np.zeros(2)
    X = np.stack((n - n.mean(), d - d.mean()), axis=1)
    level = float(rates.mean())
    precision = X.T @ X / _NOISE**2 + np.eye(2) / _SLOPE**2
    a, b = prior + np.linalg.solve(precision, X.T @ (rates - level - X @ prior) / _NOISE**2)
    k = math.exp(level - a * n.mean() - b * d.mean())
    return replace(rule, rate=(k, float(a), float(b)), highest=_BEYOND * float(np.exp(rates.max())))
