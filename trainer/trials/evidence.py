"""Evidence of paired differences: e-values that stay valid however often one looks at them.

    a gain        log loss of the base minus log loss of the change, in a pair with one seed
    an e-value    how much likelier the gains so far are if the change is better than a margin
                  than if it isn't, by the t statistic alone, so that no noise has to be known

The likelihood ratio of the t statistic under an effect and under none is a martingale where the
mean gain is the margin, and lower where it is less: the gains move the mean of a sample and not its
spread. So the chance that it ever passes 1 / alpha is at most alpha (Ville), whenever one looks and
stops. The effect, in standard deviations of a gain, has a prior of fixed places: more of them than
one, so that neither a strong nor a weak effect is missed (Perez-Ortiz, Lardy, de Heide and
Gruenwald 2024, Annals of Statistics 52, arXiv 2208.07610; Wang and Ramdas 2023, arXiv 2310.03722).

The gains of a change that does nothing are symmetric, for its pairs are runs that differ by seeds
alone. A change that makes rare runs much worse, and is as good on average, has gains that aren't:
of such skewed ones (an exponential's) 17 % passed 20 in 40 looks, where alpha is 5 %.

Invariant: numbers in, numbers out; the gains in the order of their seeds. One gain is no evidence:
its ratio is 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Array = NDArray[np.float64]
EFFECTS = (0.5, 1.0, 2.0, 4.0, 8.0)  # standard deviations of a gain; each has the same prior
_NODES = 400  # of the integral over the spread
_ROUNDS = 30  # of a bisection
_WIDE = 50.0  # standard errors from the mean within which an end of an interval is looked for


def log_evidence(gains: Array, margin: float = 0.0) -> Array:
    """Return log e-values that the mean gain is above a margin, after 1, 2, ... gains.

    gains: (..., n), each row a sequence of its own; the result has their shape.
    """
    x = np.asarray(gains, dtype=np.float64) - margin
    count = np.arange(1, x.shape[-1] + 1)
    total, square = np.cumsum(x, axis=-1), np.cumsum(x * x, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = total / np.sqrt(count * square)  # t / sqrt(n - 1 + t^2), in [-1, 1]
    cosine = np.where(square > 0, np.clip(cosine, -1.0, 1.0), 0.0)
    result = np.zeros_like(x)
    for n in count[1:]:
        result[..., n - 1] = _log_ratio(cosine[..., n - 1], int(n))
    return result


def _log_ratio(cosine: Array, n: int) -> Array:
    """Return the log likelihood ratio of n gains with this cosine to their mean, over EFFECTS.

    With a right Haar prior of the spread it is, for an effect d and u = sqrt(n) d cosine,
        exp(-n d^2 / 2) int s^(n-1) exp(-s^2/2 + u s) ds / int s^(n-1) exp(-s^2/2) ds, s > 0.
    """
    nodes, weights = _radius(n)
    logs = np.empty((len(EFFECTS), *np.shape(cosine)))
    for i, effect in enumerate(EFFECTS):
        u = math.sqrt(n) * effect * np.asarray(cosine)
        exponents = u[..., None] * nodes + weights
        top = exponents.max(axis=-1)
        inner = np.exp(exponents - top[..., None]).sum(axis=-1)
        logs[i] = top + np.log(inner) - n * effect**2 / 2
    top = logs.max(axis=0)
    return top + np.log(np.exp(logs - top).mean(axis=0))


@lru_cache(maxsize=256)
def _radius(n: int) -> tuple[Array, Array]:
    """Return places of the integral over s, and the log of their weights: those of a chi
    distribution of n degrees, as far as the largest effect moves it."""
    end = math.sqrt(n) * (1 + max(EFFECTS)) + 8.0
    nodes = (np.arange(_NODES) + 0.5) * end / _NODES
    constant = (n / 2 - 1) * math.log(2) + gammaln(n / 2)
    return nodes, (n - 1) * np.log(nodes) - nodes**2 / 2 - constant + math.log(end / _NODES)


def interval(gains: Sequence[float], level: float = 0.9) -> tuple[float, float]:
    """Return the ends of a confidence sequence for the mean gain: at any time, and at all times
    together, it holds the mean with at least this probability. Infinite before two gains."""
    x = np.asarray(gains, dtype=np.float64)
    if len(x) < 2 or not x.std():
        return -math.inf, math.inf
    low, high = _least(x, level), -_least(-x, level)
    return low, max(low, high)


def _least(x: Array, level: float) -> float:
    """Return the largest margin that was ever shown to be exceeded, at (1 - level) / 2."""
    threshold = math.log(2 / (1 - level))
    reach = _WIDE * float(x.std()) + float(np.abs(x).max())
    low, high = float(x.mean()) - reach, float(x.max())
    if log_evidence(x, low).max() < threshold:
        return -math.inf
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        exceeded = log_evidence(x, middle).max() >= threshold
        low, high = (middle, high) if exceeded else (low, middle)
    return low


@dataclass(frozen=True)
class Power:
    """What so many pairs can show of a gain. share: of trials that end with better; pairs:
    those that a trial takes in the median, None where half of the trials don't end."""

    share: float
    pairs: int | None


def power(gain: float, deviation: float, most: int, threshold: float, trials: int = 300) -> Power:
    """Return what `most` pairs show of a gain, by simulation. deviation: the standard deviation of
    a gain; threshold: the e-value that counts as shown."""
    draws = np.random.default_rng(0).standard_normal((trials, most)) + gain / deviation
    passes = log_evidence(draws) >= math.log(threshold)
    first = np.where(passes.any(axis=1), passes.argmax(axis=1) + 1, most + 1)
    median = int(np.median(first))
    return Power(float(passes.any(axis=1).mean()), median if median <= most else None)
