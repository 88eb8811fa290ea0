"""The whole loss curve of a run before it begins, from the curves of finished runs.

    a run's steps and losses -> Curve     log training loss above the held-out loss at the end, at
                                          shares of the steps
    curves, an N and a D     -> Shape     the same of a run to come, with its deviation

At each share of the steps, the log loss above that of the last steps is a power law of N and D
(shifted, so that noise near the end is no power), fitted to the runs near the target. How far the
training loss at the end is above the held-out one is a mean. The deviation is that of forecasts of
each run from the cheaper ones, or from the others where fewer than three are cheaper.

Invariant: finished runs alone are read, and a run's own curve never for its forecast. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.scaling.fitting.points import Array

SHARES = np.round(np.linspace(0.05, 1.0, 39), 4)  # of the steps
_REACH = 0.03  # of the steps on each side of a share, over which a line is fitted; at least:
_STEPS = 12
_LEAST = 3  # curves that determine a shape
_NEAR = 1.2  # runs count by a normal weight of their distance in log N and log D
_RIDGE = 0.3  # on the exponents, in units of one run that is e times larger
_SHIFT = 0.03  # log loss: of what is far smaller, and mostly noise, no power law is looked for
# The deviation that public runs have (README.md), and how many forecasts of our own it counts as.
_PRIOR = 0.06, 0.0015  # a part of the log loss above the end; beside it, at the end too
_COUNT = 4
_STUDENT = 1.15  # deviations of so few forecasts are too small


@dataclass(frozen=True)
class Curve:
    """The curve of a finished run, at SHARES: NaN where it has no steps. error: the standard error
    of `above`, by the noise of the steps; warmup: share of its steps."""

    parameters: float
    tokens: float
    above: Array
    error: Array
    warmup: float = 0.0

    @property
    def cost(self) -> float:
        return self.parameters * self.tokens

    @property
    def place(self) -> Array:
        return np.log([self.parameters, self.tokens])


@dataclass(frozen=True)
class Shape:
    """The curve of a run to come: log training loss above the held-out loss at the end, its
    standard deviation, and the number of runs that it is from."""

    shares: Array
    above: Array
    deviation: Array
    runs: int


def smoothed(shares: Array, losses: Array, end: float) -> tuple[Array, Array]:
    """Return the log loss above log `end` at SHARES, by a line through the steps around each, and
    its standard error; NaN where there are fewer than four. shares: of the steps, rising."""
    known = np.isfinite(losses) & (losses > 0)
    reach = max(_REACH, _STEPS / max(1, len(shares)))
    x, y = shares[known], np.log(losses[known] / end)
    above, error = np.full((2, len(SHARES)), np.nan)
    for i, share in enumerate(SHARES):
        near = np.abs(x - share) <= reach
        if (count := near.sum()) >= 4:
            at, values = x[near] - x[near].mean(), y[near]
            square, off = at @ at, share - x[near].mean()
            slope = at @ values / square
            rest = values - values.mean() - slope * at
            above[i] = values.mean() + slope * off
            error[i] = np.sqrt(rest @ rest / (count - 2) * (1 / count + off**2 / square))
    return above, error


def shape_of(curves: Sequence[Curve], parameters: float, tokens: float) -> Shape | None:
    """Return the shape of a run of N `parameters` on D `tokens`, or None if too few runs have a
    curve. It begins after the warm-up of all of them."""
    first = max([0.1, *(2 * curve.warmup for curve in curves)])
    whole = [c for c in curves if np.isfinite(c.above[first <= SHARES]).all()]
    if len(whole) < _LEAST or first > 0.5:
        return None
    place = np.log([parameters, tokens])
    above = _predicted(whole, place)
    squares = np.zeros(len(SHARES))
    for one in whole:
        cheaper = [c for c in whole if c.cost < one.cost * 0.99]
        others = cheaper if len(cheaper) >= _LEAST else [c for c in whole if c is not one]
        # The noise of its steps is none of the prediction: a run knows its own.
        squares += np.square(_predicted(others, one.place) - one.above) - one.error**2
    part, least = _PRIOR
    prior = np.square(part * np.maximum(0.0, above - above[-1])) + least**2
    variance = (_COUNT * prior + np.maximum(0.0, squares)) / (_COUNT + len(whole))
    deviation = _STUDENT * np.sqrt(np.maximum(variance, least**2))
    valid = first <= SHARES
    # A random walk backwards from the end: never narrower at an earlier step.
    falling = np.maximum.accumulate(deviation[valid][::-1])[::-1]
    return Shape(SHARES[valid], above[valid], falling, len(whole))


def _predicted(curves: Sequence[Curve], place: Array) -> Array:
    """Return the log loss above the end at a place in log N and log D."""
    above = np.array([c.above for c in curves])
    places = np.array([c.place for c in curves])
    far = np.square(places - place).sum(1)
    weights = np.exp((far.min() - far) / 2 / _NEAR**2)
    count = weights.sum() ** 2 / np.square(weights).sum()
    weights /= weights.sum()
    middle = weights @ places
    x = places - middle
    logs = np.log(np.maximum(above - above[:, -1:] + _SHIFT, _SHIFT / 2))
    mean = weights @ logs
    system = count * (x.T * weights) @ x + _RIDGE * np.eye(2)
    slopes = np.linalg.solve(system, count * (x.T * weights) @ (logs - mean))
    return np.exp(mean + (place - middle) @ slopes) - _SHIFT + weights @ above[:, -1]
