"""The law of mixtures of experts: the Chinchilla law, whose two terms depend on the expansion too.

    expansion   experts of a layer over those that a token uses; 1 is a dense model
    N           active parameters: those that a token is multiplied by

    L = E + A X^-delta N^-(alpha + gamma ln X) + B X^-omega D^-(beta + zeta ln X)

X is the effective expansion, which saturates: the source's E^ over its value of a dense model, so
that A, B, alpha and beta are those of table 4 at one expert, and delta, gamma, omega and zeta those
of table 3. Invariant: at expansion 1, X is 1 and the law is the Chinchilla law with A, B, E, alpha
and beta. Unlike all other exponents, delta, gamma, omega and zeta may have either sign.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from forescale.scaling.fitting.forms import Design, PowerSum, Term
from forescale.scaling.fitting.points import Array

# E_start and E_max of table 3. They are held: few different expansions don't determine them.
_START, _MOST = 2.0732, 290.4521
_SIGNED = {"delta": 5.0, "gamma": 1.0, "omega": 5.0, "zeta": 1.0}  # the greatest size of each
_FIRST = 5  # index of delta


def effective_expansion(log_expansion: Array) -> Array:
    """Return ln X of ln(expansion), (n,).

    Ludziejewski et al. 2025, eq. 4 (of Clark et al. 2022,
    arXiv 2202.01169), over its value at 1.
    """
    rest = 1 / (1 / _START - 1 / _MOST)
    return -np.log(1 / (np.expm1(log_expansion) + rest) + 1 / _MOST) - np.log(_START)


@dataclass(frozen=True)
class Experts(PowerSum):
    """The law above. Its terms are those of Chinchilla, with coefficients and exponents that are
    linear in ln X."""

    def _features(self, at: Design) -> dict[int, list[tuple[int, Array]]]:
        """Return the derivatives of each term's log by theta, {coefficient: [(place, (n,))]}.

        They don't depend on theta. N and D are centred in the exponents alpha and beta alone, so
        that delta and omega are as published.
        """
        x = effective_expansion(at.logs["expansion"] + at.centre["expansion"])
        features: dict[int, list[tuple[int, Array]]] = {2: [(2, np.ones_like(x))]}
        for c, e, first, column in ((0, 3, _FIRST, "parameters"), (1, 4, _FIRST + 2, "tokens")):
            log = at.logs[column]
            rows = ((c, np.ones_like(x)), (e, -log), (first, -x))
            features[c] = [*rows, (first + 1, -x * (log + at.centre[column]))]
        return features

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        shares, features = {}, self._features(at)
        for c, rows in features.items():
            shares[c] = np.exp(sum(theta[:, place, None] * row for place, row in rows))
        total = sum(shares.values())
        jacobian = np.zeros((len(theta), self.size, total.shape[-1]), dtype=theta.dtype)
        for c, rows in features.items():
            for place, row in rows:
                jacobian[:, place] = shares[c] / total * row
        return np.log(total), jacobian

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        """Return the weighted sum of second derivatives in closed form; see PowerSum.curvature."""
        total = np.zeros((len(theta), self.size, self.size))
        for c, rows in self._features(at).items():
            drawn = jacobian[:, c] * pull
            for i, one in rows:
                for j, other in rows:
                    total[:, i, j] += drawn @ (one * other)
        return total

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        low, high = super().bounds(at, log_loss)
        high[_FIRST:] = list(_SIGNED.values())
        low[_FIRST:] = -high[_FIRST:]
        return low, high

    def axes(self) -> tuple[Array, ...]:
        # The four others start at no effect of experts.
        return (np.geomspace(0.04, 1.6, 14),) * 2 + (np.zeros(1),) * len(_SIGNED)

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        rows = self._features(at)
        theta = np.hstack((np.zeros((len(grid), 3)), grid))
        logs = [sum(theta[:, place, None] * row for place, row in rows[c]) for c in range(3)]
        return np.exp(np.stack(logs, axis=1)), np.ones(len(grid))


EXPERTS = Experts(
    "experts",
    "Ludziejewski et al. 2025, arXiv 2502.05172, eq. 6",
    ("A", "B", "E", "alpha", "beta", *_SIGNED),
    ("parameters", "tokens", "expansion"),
    ("alpha", "beta", *_SIGNED),
    (Term("A", "alpha", "parameters"), Term("B", "beta", "tokens"), Term("E")),
)
