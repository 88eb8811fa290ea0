"""Mixing laws: from the shares of the sources to held-out losses, and back to the best shares.

    linear        log L = sum_j b_j r_j
    quadratic     and the products r_j r_k (Scheffé 1958; regressions of RegMix, arXiv 2407.01492)
    power         log L = a + sum_j b_j log r_j (as in BiMix, arXiv 2405.14908)
    exponential   L = c + exp(sum_j b_j r_j) (data mixing laws, Ye et al. 2024, arXiv 2403.16952;
                  its k is a part of b, since shares sum to 1)

Each loss has parameters of its own. What is minimised are squares of residuals of log L, weighted:
fits without a run, and of drawn losses, are solved in one batch.
Invariant: shares are searched only within the range that the runs have of each source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from forescale.scaling.fitting.points import Array

# Mixtures of a study by name, and the run of the current one.
CURRENT, BEST, FIRST = "current", "best", "m00"
_HIGHEST = 0.99  # greatest floor c, in units of the lowest loss
_FLOORS = (16, 9, 9, 9, 9)  # floors tried, in the whole range and then around the best one
_RIDGE = 1e-10  # of the mean square of the features: equations of too few runs stay solvable
_STEP, _FINEST = 0.16, 5e-4  # of shares, moved from a source to another
_ROUNDS = 400


def rounded_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Return shares with four decimals that sum to 1; the largest one takes the rounding errors."""
    total = sum(weights.values())
    shares = {name: round(w / total, 4) for name, w in weights.items()}
    largest = max(shares, key=lambda name: shares[name])
    shares[largest] = round(shares[largest] + 1 - sum(shares.values()), 4)
    return shares


@dataclass(frozen=True)
class MixingLaw:
    """A form of the law. features: of shares (..., S), (..., p); has_floor: whether c is fitted."""

    name: str
    text: str
    features: Callable[[Array], Array]
    has_floor: bool = False

    def size(self, sources: int) -> int:
        """Return the number of parameters of one loss."""
        return self.features(np.full((1, sources), 0.5)).shape[-1] + self.has_floor

    def fit(self, shares: Array, losses: Array, weights: Array | None = None) -> "Mixing":
        """Return the B fits. shares: (n, S); losses: (n, T), or (B, n, T) of drawn ones; weights:
        (B, n), None for equal ones."""
        drawn = losses.reshape(-1, *losses.shape[-2:])
        weights = np.ones((len(drawn), len(shares))) if weights is None else weights
        shape = (len(weights), *drawn.shape[:0:-1])  # (B, T, n)
        x, losses = self.features(shares), np.broadcast_to(np.swapaxes(drawn, -1, -2), shape)
        weights = np.broadcast_to(weights[:, None], shape)
        if not self.has_floor:
            slopes, _ = _solved(x, np.log(losses), weights)
            return Mixing(self, np.zeros(shape[:2]), slopes)
        lowest = np.where(weights > 0, losses, np.inf).min(axis=-1)
        centre, half = np.full(lowest.shape, _HIGHEST / 2), _HIGHEST / 2
        for count in _FLOORS:
            tried = np.clip(centre + half * np.linspace(-1, 1, count)[:, None, None], 0, _HIGHEST)
            values = np.stack([self._at(x, losses, weights, f * lowest)[1] for f in tried])
            best = np.argmin(values, axis=0)[None]
            centre, half = np.take_along_axis(tried, best, 0)[0], 2 * half / (count - 1)
        floor = centre * lowest
        return Mixing(self, floor, self._at(x, losses, weights, floor)[0])

    def _at(self, x: Array, losses: Array, weights: Array, floor: Array) -> tuple[Array, Array]:
        """Return b, (B, T, p), and the objective, (B, T), with this floor, (B, T)."""
        # A run that a fit leaves out may be below its floor.
        above = np.maximum(losses - floor[..., None], 1e-9)
        # A small residual of log(L - c) is one of log L times (L - c) / L.
        slopes, lines = _solved(x, np.log(above), weights * np.square(above / losses))
        residuals = np.log(floor[..., None] + np.exp(lines)) - np.log(losses)
        return slopes, (weights * np.square(residuals)).sum(-1)


def _solved(x: Array, y: Array, weights: Array) -> tuple[Array, Array]:
    """Return weighted least squares: b, (B, T, p), and x b. x: (n, p); y, weights: (B, T, n)."""
    p = x.shape[1]
    products = (x[:, :, None] * x[:, None]).reshape(len(x), p * p)
    left = (weights @ products).reshape(*weights.shape[:2], p, p)
    scale = np.trace(left, axis1=-2, axis2=-1)[..., None, None] / p + 1e-300
    right = ((weights * y) @ x)[..., None]
    slopes = np.linalg.solve(left + _RIDGE * scale * np.eye(p), right)[..., 0]
    return slopes, slopes @ x.T


@dataclass(frozen=True)
class Mixing:
    """B fits of a law to T losses. floor: c, (B, T); slopes: b, (B, T, p)."""

    law: MixingLaw
    floor: Array
    slopes: Array

    def losses(self, shares: Array) -> Array:
        """Return the predicted losses of K mixtures, (B, K, T). shares: (K, S), or (B, K, S)."""
        x = self.law.features(shares)
        exponents = np.clip(x @ np.swapaxes(self.slopes, -1, -2), -50, 50)
        return self.floor[:, None] + np.exp(exponents)


def _quadratic(shares: Array) -> Array:
    pairs = [shares[..., i] * shares[..., j] for i, j in combinations(range(shares.shape[-1]), 2)]
    return np.concatenate((shares, np.stack(pairs, axis=-1)), axis=-1)


LAWS = (
    MixingLaw("linear", "log L = Σ b_j r_j", lambda shares: shares),
    MixingLaw("quadratic", "log L = Σ b_j r_j + Σ b_jk r_j r_k", _quadratic),
    MixingLaw("power", "log L = a + Σ b_j log r_j",
              lambda shares: np.concatenate((np.ones_like(shares[..., :1]), np.log(shares)), -1)),
    MixingLaw("exponential", "L = c + exp(Σ b_j r_j)", lambda shares: shares, has_floor=True),
)  # fmt: skip


def laws_for(shares: Array) -> list[MixingLaw]:
    """Return the laws that these mixtures, (n, S), can determine with one of them left out."""
    n, sources = shares.shape
    is_inside = bool((shares > 0).all())  # the logarithm of 0 is none
    return [w for w in LAWS if w.size(sources) < n - 1 and (is_inside or w.name != "power")]


def left_out(law: MixingLaw, shares: Array, losses: Array) -> Array:
    """Return what the law predicts of each mixture from all others, (n, T)."""
    n = len(shares)
    return law.fit(shares, losses, 1 - np.eye(n)).losses(shares)[np.arange(n), np.arange(n)]


def nearest(shares: Array) -> Array:
    """Return the index of the nearest other mixture of each one, (n,)."""
    distances = np.square(shares[:, None] - shares).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1)


def drawn_losses(law: MixingLaw, shares: Array, losses: Array, count: int, seed: int) -> Array:
    """Return the losses of `count` drawn studies, (count, n, T): those of the fit, and of each run
    the residuals of a drawn one (the bootstrap of residuals, Efron and Tibshirani 1993, 9.4).

    A residual is smaller than its error where a run pulls the fit, as runs near corners do. The
    geometric mean with that of the fit without the run corrects that: r / sqrt(1 - leverage).
    """
    fitted, logs = np.log(law.fit(shares, losses).losses(shares)[0]), np.log(losses)
    inside, outside = logs - fitted, logs - np.log(left_out(law, shares, losses))
    residuals = np.sign(inside) * np.sqrt(np.abs(inside * outside))
    residuals -= residuals.mean(axis=0)
    n = len(shares)
    drawn = np.random.default_rng(seed).integers(n, size=(count, n))
    return np.asarray(np.exp(fitted + residuals[drawn]))


def best_shares(predict: Callable[[Array], Array], starts: Array, count: int) -> Array:
    """Return the shares with the least predicted value for each of `count` fits, (count, S).

    predict: from shares (count, K, S) to values (count, K); starts: the mixtures of the runs, the
    best of which a search begins at, (K, S). It moves a share from one source to another while that
    is better, and then a smaller one.
    """
    sources = starts.shape[1]
    low, high = starts.min(axis=0), starts.max(axis=0)
    ends = np.eye(sources)
    moves = np.array([ends[j] - ends[i] for i, j in permutations(range(sources), 2)])
    values = predict(np.broadcast_to(starts, (count, *starts.shape)))
    best, rows = values.argmin(axis=1), np.arange(count)
    at, value, step = starts[best].copy(), values[rows, best], np.full(count, _STEP)
    for _ in range(_ROUNDS):
        tried = at[:, None] + step[:, None, None] * moves
        outside = ((tried < low - 1e-12) | (tried > high + 1e-12)).any(axis=-1)
        values = np.where(outside, np.inf, predict(np.clip(tried, low, high)))
        best = values.argmin(axis=1)
        is_better = values[rows, best] < value
        at = np.where(is_better[:, None], tried[rows, best], at)
        value = np.where(is_better, values[rows, best], value)
        step = np.where(is_better, step, step / 2)
        if (step < _FINEST).all():
            break
    at = np.clip(at, low, high)
    return np.asarray(at / at.sum(axis=1, keepdims=True))
