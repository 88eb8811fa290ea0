"""The published laws, each with its source, and the compute-optimal N and D that they imply.

Invariant: coefficients are positive, and exponents are those of falling powers (N ** -alpha),
whatever sign the source prints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from forescale.ground.errors import UserError
from forescale.scaling.fitting.forms import EXPONENTS, Design, Form, PowerSum, Term
from forescale.scaling.fitting.points import Array

_STEP = 1e-30
# E_start and E_max of the law of experts, table 3. They are held: few different expansions don't
# determine them.
_START, _MOST = 2.0732, 290.4521
_SIGNED = {"delta": 5.0, "gamma": 1.0, "omega": 5.0, "zeta": 1.0}  # the greatest size of each
_FIRST = 5  # index of delta

CHINCHILLA = PowerSum(
    "chinchilla",
    "Hoffmann et al. 2022, arXiv 2203.15556, eq. 2: L = E + A N^-alpha + B D^-beta",
    ("A", "B", "E", "alpha", "beta"),
    ("parameters", "tokens"),
    ("alpha", "beta"),
    ((0.04, 1.6, 20),) * 2,
    (Term("A", "alpha", "parameters"), Term("B", "beta", "tokens"), Term("E")),
)
SHARED_EXPONENT = PowerSum(
    "shared exponent",
    "Muennighoff et al. 2023, arXiv 2305.16264, appendix A: L = E + A N^-alpha + B D^-alpha",
    ("A", "B", "E", "alpha"),
    ("parameters", "tokens"),
    ("alpha",),
    ((0.04, 1.6, 48),),
    (Term("A", "alpha", "parameters"), Term("B", "alpha", "tokens"), Term("E")),
)
FRONTIER = PowerSum(
    "frontier",
    "L*(C) = E + K C^-gamma along compute-optimal runs; Hoffmann et al. 2022, eq. 4 put into eq. 2",
    ("K", "E", "gamma"),
    ("flops",),
    ("gamma",),
    ((0.04, 1.6, 48),),
    (Term("K", "gamma", "flops"), Term("E")),
)


@dataclass(frozen=True)
class OverTraining(PowerSum):
    """The shared-exponent law as a function of compute and of tokens per parameter, M = D / N:

    L = E + (a M^eta + b M^-eta) C^-eta with C = 6 N D, so that A = a / 6^eta, B = b / 6^eta and
    alpha = 2 eta.
    """

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        values = super().published(theta, centre)
        values[:, 3] /= 2
        values[:, :2] *= 6 ** values[:, 3:]
        return values

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        plain = np.array(values, dtype=float)
        plain[:, :2] /= 6 ** plain[:, 3:]
        plain[:, 3] *= 2
        return super().internal(plain, centre)


OVER_TRAINING = OverTraining(
    "over-training",
    "Gadre et al. 2024, arXiv 2403.08540, eq. 4",
    ("a", "b", "E", "eta"),
    ("parameters", "tokens"),
    ("eta",),
    ((0.04, 1.6, 48),),
    (Term("a", "eta", "parameters"), Term("b", "eta", "tokens"), Term("E")),
)


@dataclass(frozen=True)
class Kaplan(Form):
    """The law L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, without irreducible loss."""

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        n_c, d_c, alpha_n, alpha_d = (theta[:, i, None] for i in range(4))
        small = n_c - at.logs["parameters"]
        sized, fed = alpha_n / alpha_d * small, d_c - at.logs["tokens"]
        top = np.maximum(sized.real, fed.real)
        inner = top + np.log(np.exp(sized - top) + np.exp(fed - top))
        share = np.exp(sized - inner)
        rows = (alpha_n * share, alpha_d * (1 - share), share * small, inner - share * sized)
        return alpha_d * inner, np.stack(rows, axis=1)

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        least, most = EXPONENTS
        return np.array([-200.0, -200.0, least, least]), np.array([400.0, 400.0, most, most])

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        """Return the two summands without their coefficients, and the power 1 / alpha_D."""
        ratio = (grid[:, 0] / grid[:, 1])[:, None]
        tokens = np.broadcast_to(-at.logs["tokens"], (len(grid), len(at.logs["tokens"])))
        return np.exp(np.stack((-ratio * at.logs["parameters"], tokens), axis=1)), 1 / grid[:, 1]

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        log = np.log(coefficients)
        ratio = grid[:, 0] / grid[:, 1]
        return np.stack((log[:, 0] / ratio, log[:, 1], grid[:, 0], grid[:, 1]), axis=1)

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        shift = np.array([centre["parameters"], centre["tokens"]])
        return np.hstack((np.exp(theta[:, :2] + shift), theta[:, 2:]))

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        shift = np.array([centre["parameters"], centre["tokens"]])
        return np.hstack((np.log(values[:, :2]) - shift, values[:, 2:]))


KAPLAN = Kaplan(
    "kaplan",
    "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5",
    ("N_c", "D_c", "alpha_N", "alpha_D"),
    ("parameters", "tokens"),
    ("alpha_N", "alpha_D"),
    ((0.02, 1.0, 20),) * 2,
)


@dataclass(frozen=True)
class DataConstrained(PowerSum):
    """The Chinchilla law on effective data, for training on repeated tokens.

    D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)): the value of a token falls each time it is
    repeated. (The source also lets the value of parameters fall beyond the size that U suffices
    for, with all but R_D and R_N held; this law has all else free and no R_N.)
    """

    def _effective(self, log_r: Any, at: Design) -> tuple[dict[str, Any], Any]:
        """Return the centred logs of N and D', (R, n), and the derivative of log D' by log R_D."""
        tokens, unique = (at.logs[c] + at.centre[c] for c in ("tokens", "unique_tokens"))
        unique = np.minimum(tokens, unique)
        again = np.expm1(tokens - unique)  # repetitions
        r = np.exp(log_r[:, None])
        faded = np.exp(-again / r)
        worth = 1 + r * (1 - faded)
        logs = {**at.logs, "tokens": unique - at.centre["tokens"] + np.log(worth)}
        return logs, (r * (1 - faded) - again * faded) / worth

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        logs, slope = self._effective(theta[:, 5], at)
        m, jacobian = super().evaluate(theta, Design(logs, at.centre))
        jacobian[:, 5] = -theta[:, 4, None] * jacobian[:, 1] * slope
        return m, jacobian

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        return Form.curvature(self, theta, at, jacobian, pull)  # by a complex step

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        low, high = super().bounds(at, log_loss)
        low[5], high[5] = np.log(1e-2), np.log(1e4)
        return low, high

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        logs, _ = self._effective(np.log(grid[:, 2]), at)
        return super().basis(grid, Design(logs, at.centre))

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        return np.hstack((np.log(coefficients), grid[:, :2], np.log(grid[:, 2:])))

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        values = super().published(theta, centre)
        values[:, 5:] = np.exp(theta[:, 5:])
        return values

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        theta = super().internal(values, centre)
        theta[:, 5:] = np.log(np.asarray(values)[:, 5:])
        return theta


DATA_CONSTRAINED = DataConstrained(
    "data-constrained",
    "Muennighoff et al. 2023, arXiv 2305.16264, eq. 5",
    (*CHINCHILLA.symbols, "R_D"),
    ("parameters", "tokens", "unique_tokens"),
    (*CHINCHILLA.exponents, "R_D"),
    ((0.06, 1.2, 8), (0.06, 1.2, 8), (1, 100, 5)),
    CHINCHILLA.terms,
)


def effective_expansion(log_expansion: Array) -> Array:
    """Return ln X of ln(expansion), (n,). Ludziejewski et al. 2025, eq. 4 (of Clark et al. 2022,
    arXiv 2202.01169), over its value at 1."""
    rest = 1 / (1 / _START - 1 / _MOST)
    return -np.log(1 / (np.expm1(log_expansion) + rest) + 1 / _MOST) - np.log(_START)


@dataclass(frozen=True)
class Experts(PowerSum):
    """The law of mixtures of experts: Chinchilla's, whose two terms depend on the expansion too.

    L = E + A X^-delta N^-(alpha + gamma ln X) + B X^-omega D^-(beta + zeta ln X)

    expansion: experts of a layer over those that a token uses, 1 in a dense model; N: active
    parameters. X is the source's E^ over its value of a dense model, so that at expansion 1 the law
    is Chinchilla's with A, B, E, alpha and beta (table 4 at one expert; the others are those of
    table 3). Unlike all other exponents, delta, gamma, omega and zeta may have either sign.
    """

    def _features(self, at: Design) -> dict[int, list[tuple[int, Array]]]:
        """Return the derivatives of each term's log by theta, {coefficient: [(place, (n,))]}. They
        don't depend on theta. N and D are centred in the exponents alpha and beta alone, so that
        delta and omega are as published."""
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

    def grid(self) -> Array:
        both = super().grid()  # the four others start at no effect of experts
        return np.hstack((both, np.zeros((len(both), len(_SIGNED)))))

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
    ((0.04, 1.6, 14),) * 2,
    (Term("A", "alpha", "parameters"), Term("B", "beta", "tokens"), Term("E")),
)


FORMS: Mapping[str, Form] = {
    "chinchilla": CHINCHILLA,
    "shared-exponent": SHARED_EXPONENT,
    "over-training": OVER_TRAINING,
    "kaplan": KAPLAN,
    "frontier": FRONTIER,
    "data-constrained": DATA_CONSTRAINED,
    "experts": EXPERTS,
}


def allocation(form: Form, values: Mapping[str, float] | ArrayLike) -> Array:
    """Return a of N* ~ C^a, (...), for published parameters, (..., p). a = beta / (alpha + beta)
    (Hoffmann et al. 2022, eq. 4). Raises UserError for a law whose N* is no power law of C."""
    vector, places = form.vector(values), {"parameters": 2, "tokens": 3}
    if isinstance(form, PowerSum):
        places = {t.column: form.symbols.index(t.exponent) for t in form.terms if t.exponent}
    if form.columns != ("parameters", "tokens"):
        raise UserError(form.name, "the optimum is no power law of compute", "fit another law")
    alpha, beta = vector[..., places["parameters"]], vector[..., places["tokens"]]
    return beta / (alpha + beta)


def compute_optimal(
    form: Form,
    values: Mapping[str, float] | ArrayLike,
    flops: ArrayLike,
    per_parameter_token: float = 6.0,
    **held: float | None,
) -> tuple[Array, Array]:
    """Return the compute-optimal N* and D*, (..., m) each, at m budgets of FLOPs.

    They have the least loss with C = per_parameter_token N D, by published parameters, (..., p).
    Found by bisection of the exact slope along the budget (a complex step): each law has one
    minimum there. held: unique_tokens= and expansion=, of laws that read them. Raises UserError for
    a law without N and D, and if a held column is missing.
    """
    if not {"parameters", "tokens"} <= set(form.columns):
        raise UserError(form.name, "the law does not read N and D", "fit a law that does")
    others = [c for c in form.columns if c not in ("parameters", "tokens")]
    for name in others:
        if not held.get(name):
            problem = f"the law reads the {name.replace('_', ' ')}"
            raise UserError(form.name, problem, f"give {name}=")
    vector = form.vector(values)
    budget = np.log(np.atleast_1d(np.asarray(flops, dtype=float)) / per_parameter_token)
    zero = dict.fromkeys(form.columns, 0.0)
    theta = form.internal(vector.reshape(-1, form.size), zero).astype(complex)
    low = np.zeros((len(theta), len(budget)))
    fixed = {name: low + np.log(held[name] or 1.0) for name in others}
    high = low + budget
    for _ in range(64):
        n = (low + high) / 2
        aside = n + _STEP * 1j
        logs = {"parameters": aside, "tokens": budget - aside, **fixed}
        falls = form.evaluate(theta, Design(logs, zero))[0].imag < 0
        low, high = np.where(falls, n, low), np.where(falls, high, n)
    n = ((low + high) / 2).reshape(*vector.shape[:-1], -1)
    return np.exp(n), np.exp(budget - n)
