"""Learning rates and batches from trial runs: the best of a sweep, and a rule for the sizes and
budgets without one.

Invariant: a best learning rate has worse ones on both sides. If the best is at the edge of the
sweep, `inside` is False and `next_rate` gives the rate to try next; it never counts as an optimum.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from forescale.ground.typed import AnyNumber, Flag, Number, Positive
from forescale.scaling.design.shapes import Rule

_SLOPE, _NOISE = 0.3, 0.3  # prior standard deviation of the exponents of N and D; of a log rate
_BEYOND = 2.0  # largest multiple of the highest best rate that the rule may give


@dataclass(frozen=True)
class Tuned:
    """The best value of a sweep, by a parabola of log loss in the log of the value.

    gap: log loss by which the best run is above the parabola's minimum (0 at an edge); inside:
    whether values on both sides were worse; tried: lowest and highest value; bend: the parabola's
    quadratic coefficient, valid over `ends`; None without a parabola.
    """

    learning_rate: Positive
    gap: Number
    inside: Flag
    tried: tuple[AnyNumber, AnyNumber] = (math.nan, math.nan)
    bend: Number | None = None
    ends: tuple[Positive, Positive] | None = None

    def next_rate(self, factor: float) -> float | None:
        """Return the rate to try next if the best is at an edge, else None."""
        if self.inside:
            return None
        low, high = self.tried
        return low / factor if self.learning_rate == low else high * factor


def tuned(rates: Sequence[float], losses: Sequence[float]) -> Tuned:
    """Return the best value of a sweep of three or more runs.

    It is the minimum of the parabola through the best run and its neighbours, or the best run if
    it is at the edge or a neighbour diverged. A parabola through an edge is none: its minimum may
    be just inside by the noise of the runs alone. A loss that is not finite counts as worse than
    all others.
    """
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, dtype=float)[order]), np.asarray(losses, dtype=float)[order]
    y = np.log(np.where(np.isfinite(y), y, np.inf))
    best, sorted_rates = int(np.argmin(y)), sorted(map(float, rates))
    rate, tried = sorted_rates[best], (sorted_rates[0], sorted_rates[-1])
    is_inside, near = 0 < best < len(x) - 1, slice(max(best - 1, 0), best + 2)
    if not is_inside or not np.isfinite(y[near]).all():
        return Tuned(rate, 0.0, is_inside, tried)
    bend, slope, _ = np.polyfit(x[near] - x[best], y[near], 2)
    at = -slope / (2 * bend) if bend > 0 else np.inf
    if not x[near][0] < x[best] + at < x[near][-1]:  # by rounding, of losses all but equal
        return Tuned(rate, 0.0, True, tried)
    ends = sorted_rates[near.start], sorted_rates[near.stop - 1]
    gap = float(bend * at**2)
    return Tuned(float(np.exp(x[best] + at)), gap, True, tried, float(bend), ends)


@dataclass(frozen=True)
class RateBatchResponse:
    """The best learning rate and batch of a sweep of both.

    inside: whether the best is within the tried ranges; if not, learning_rate and batch are those
    of the best run, and `edges` names the quantity whose range ends there. gap: log loss by which
    the best run is above the fitted minimum; 0 without one.
    """

    learning_rate: float
    batch: float
    inside: bool
    edges: tuple[str, ...]
    gap: float


def rate_batch_response(
    rates: Sequence[float], batches: Sequence[float], losses: Sequence[float]
) -> RateBatchResponse:
    """Return the best learning rate and batch. Fits a quadratic surface of log loss over log rate
    and log batch to all runs that did not diverge (least squares); with a single learning rate, a
    parabola over log batch. Without a minimum inside the tried ranges, the best run counts."""
    x, y = np.log(np.asarray(rates, float)), np.log(np.asarray(batches, float))
    z = np.asarray(losses, float)
    z = np.log(np.where(np.isfinite(z), z, np.inf))
    best = int(np.argmin(z))
    varied = {"learning rate": x, "batch": y} if np.ptp(x) else {"batch": y}
    edges = tuple(name for name, v in varied.items() if v[best] in (v.min(), v.max()))
    best_run = RateBatchResponse(float(rates[best]), float(batches[best]), not edges, edges, 0.0)
    if edges:
        return best_run
    if not np.ptp(x):
        line = tuned(batches, losses)
        return RateBatchResponse(float(rates[best]), line.learning_rate, True, (), line.gap)
    a, b, finite = x - x[best], y - y[best], np.isfinite(z)
    X = np.stack((np.ones_like(a), a, b, a * a, a * b, b * b), axis=1)[finite]
    if np.linalg.matrix_rank(X) < X.shape[1]:
        return best_run
    level, p, q, r, s, t = np.linalg.lstsq(X, z[finite], rcond=None)[0]
    bend = np.array([[2 * r, s], [s, 2 * t]])
    if not (np.linalg.eigvalsh(bend) > 0).all():
        return best_run
    at = -np.linalg.solve(bend, [p, q])
    if not all(v.min() <= d <= v.max() for v, d in zip((a, b), at, strict=True)):
        return best_run
    lowest = level + np.array([p, q]) @ at / 2
    rate, batch = np.exp(x[best] + at[0]), np.exp(y[best] + at[1])
    return RateBatchResponse(float(rate), float(batch), True, (), max(0.0, float(level - lowest)))


def best_rates(runs: Iterable[tuple[int, float, float]]) -> tuple[dict[int, Tuned], float]:
    """Return the best rate of each N, and the largest gap, of runs (N, learning rate, loss)."""
    tried: dict[int, list[tuple[float, float]]] = {}
    for n, rate, loss in runs:
        tried.setdefault(n, []).append((rate, loss))
    best = {n: tuned([r for r, _ in each], [y for _, y in each]) for n, each in tried.items()}
    return best, max((t.gap for t in best.values()), default=0.0)


def interpolated_rate(rates: Mapping[int, Tuned], parameters: float) -> float:
    """Return the learning rate of a size between swept ones: log rate is linear in log N."""
    n = sorted(rates)
    if len(n) == 1:
        return rates[n[0]].learning_rate
    logs = [math.log(rates[k].learning_rate) for k in n]
    return float(np.exp(np.interp(math.log(parameters), np.log(n), logs)))


def updated_rule(rule: Rule, best: Sequence[tuple[float, float, float]]) -> Rule:
    """Return the rule with its learning rate fitted to the best rates so far.

    best: (non-embedding N, D, best rate). The log rate is linear in log N and log D. The prior of
    the exponents is Gaussian with standard deviation 0.3, around the rule's exponents if the rule
    covers all of them, else around 0; the noise of a log rate is 0.3. So a few sweeps move the
    level, and many the exponents.
    """
    if not best:
        return rule
    n, d, rates = np.log(np.array(best, dtype=float)).T
    covered = all(rule.covers(size, tokens) for size, tokens, _ in best)
    prior = np.array(rule.rate[1:]) if covered else np.zeros(2)
    X = np.stack((n - n.mean(), d - d.mean()), axis=1)
    level = float(rates.mean())
    precision = X.T @ X / _NOISE**2 + np.eye(2) / _SLOPE**2
    a, b = prior + np.linalg.solve(precision, X.T @ (rates - level - X @ prior) / _NOISE**2)
    k = math.exp(level - a * n.mean() - b * d.mean())
    return replace(rule, rate=(k, float(a), float(b)), highest=_BEYOND * float(np.exp(rates.max())))
