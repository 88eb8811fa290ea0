"""The published laws, each with its source, and the compute-optimal N and D that they imply.

Invariant: coefficients are positive, and exponents are those of falling powers (N ** -alpha),
whatever sign the source prints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from forescale.ground.errors import UserError
from forescale.scaling.fitting.effective import DATA_CONSTRAINED, PRECISION, QUANTISED, R_D
from forescale.scaling.fitting.forms import EXPONENTS, Design, Features, Form, PowerSum, Term
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


def repeated(form: Form, values: ArrayLike) -> Array:
    """Return the parameters of DATA_CONSTRAINED, (..., 6), of a law's, (..., p): with the published
    R_D, if it has none. Raises UserError for a law without A, B and E."""
    if form is DATA_CONSTRAINED:
        return form.vector(values)
    if form not in (CHINCHILLA, SHARED_EXPONENT):
        problem = f"the law {form.name} doesn't say what repeated tokens are worth"
        raise UserError("target.unique", problem, "write form=chinchilla or form=data-constrained")
    law = form.vector(values)[..., [0, 1, 2, 3, -1]]
    return np.concatenate((law, np.full_like(law[..., :1], R_D)), axis=-1)


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

    CHOICE = "expansion"

    def features(self, logs: Mapping[str, Any], centre: Mapping[str, float]) -> Features:
        # N and D are centred in the exponents alpha and beta alone, so that delta and omega are as
        # published.
        x = effective_expansion(logs["expansion"] + centre["expansion"])
        features = super().features(logs, centre)
        for c, first, column in ((0, _FIRST, "parameters"), (1, _FIRST + 2, "tokens")):
            features[c] += [(first, -x), (first + 1, -x * (logs[column] + centre[column]))]
        return features

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        low, high = super().bounds(at, log_loss)
        high[_FIRST:] = list(_SIGNED.values())
        low[_FIRST:] = -high[_FIRST:]
        return low, high

    def grid(self) -> Array:
        both = super().grid()  # the four others start at no effect of experts
        return np.hstack((both, np.zeros((len(both), len(_SIGNED)))))


EXPERTS = Experts(
    "experts",
    "Ludziejewski et al. 2025, arXiv 2502.05172, eq. 6",
    ("A", "B", "E", "alpha", "beta", *_SIGNED),
    ("parameters", "tokens", "expansion"),
    ("alpha", "beta", *_SIGNED),
    ((0.04, 1.6, 14),) * 2,
    (Term("A", "alpha", "parameters"), Term("B", "beta", "tokens"), Term("E")),
)


@dataclass(frozen=True)
class Vocabulary(PowerSum):
    """The law of the size of the vocabulary, L = E + A N^-beta + A_v N_v^-alpha_v + B D^-beta.

    N_v: parameters of the vocabulary; N: all others. L is one that vocabularies don't change, such
    as the loss over that of unigrams (plus a constant: it is negative), or bits per byte.
    """

    CHOICE = "vocabulary"
    BETWEEN = (1e4, 1e13)
    PRICED = "C is 6 (N + N_v) D."

    def log_cost(self, logs: Mapping[str, Any]) -> Any:
        return np.log1p(np.exp(logs["vocabulary"] - logs["parameters"]))


VOCABULARY = Vocabulary(
    "vocabulary",
    "Tao et al. 2024, arXiv 2407.13623, eq. 6, with alpha_1 = beta as there",
    ("A", "A_v", "B", "E", "alpha_v", "beta"),
    ("parameters", "tokens", "vocabulary"),
    ("alpha_v", "beta"),
    ((0.04, 1.6, 14),) * 2,
    (Term("A", "beta", "parameters"), Term("A_v", "alpha_v", "vocabulary"),
     Term("B", "beta", "tokens"), Term("E")),
)  # fmt: skip


FORMS: Mapping[str, Form] = {
    "chinchilla": CHINCHILLA,
    "shared-exponent": SHARED_EXPONENT,
    "over-training": OVER_TRAINING,
    "kaplan": KAPLAN,
    "frontier": FRONTIER,
    "data-constrained": DATA_CONSTRAINED,
    "experts": EXPERTS,
    "precision": PRECISION,
    "quantised": QUANTISED,
    "vocabulary": VOCABULARY,
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
    **held: ArrayLike | None,
) -> tuple[Array, Array]:
    """Return the compute-optimal N* and D*, (..., m) each, at m budgets of FLOPs.

    They have the least loss with C = per_parameter_token N D (times what a PRICED law's settings
    cost), by published parameters, (..., p). Found by bisection of the exact slope along the budget
    (a complex step): each law has one minimum there. held: unique_tokens= and settings, (m,) or one
    for each of the parameters, (R, 1). Raises UserError for a law without N and D, and if a held
    column is missing.
    """
    if not {"parameters", "tokens"} <= set(form.columns):
        raise UserError(form.name, "the law does not read N and D", "fit a law that does")
    others = [c for c in form.columns if c not in ("parameters", "tokens")]
    for name in others:
        if held.get(name) is None:
            problem = f"the law reads the {name.replace('_', ' ')}"
            raise UserError(form.name, problem, f"give {name}=")
    vector = form.vector(values)
    budget = np.log(np.atleast_1d(np.asarray(flops, dtype=float)) / per_parameter_token)
    zero = dict.fromkeys(form.columns, 0.0)
    theta = form.internal(vector.reshape(-1, form.size), zero).astype(complex)
    low = np.zeros((len(theta), len(budget)))
    fixed = {name: low + np.log(np.asarray(held[name], dtype=float)) for name in others}
    high = low + budget
    for _ in range(64):
        n = (low + high) / 2
        falls = _along(form, theta, budget, {"parameters": n + _STEP * 1j, **fixed})[0].imag < 0
        low, high = np.where(falls, n, low), np.where(falls, high, n)
    n = (low + high) / 2
    d = budget - n - form.log_cost({"parameters": n, **fixed})
    n, d = (np.exp(x).reshape(*vector.shape[:-1], -1) for x in (n, d))
    return n, d


def _along(form: Form, theta: Array, budget: Array, logs: dict[str, Array]) -> tuple[Array, Array]:
    """Return log loss and log D, (R, m), of runs that cost a budget: log C over that of 6 N D."""
    d = budget - logs["parameters"] - form.log_cost(logs)
    zero = dict.fromkeys(form.columns, 0.0)
    return form.evaluate(theta, Design({**logs, "tokens": d}, zero))[0], d


def best_setting(
    form: Form,
    values: ArrayLike,
    flops: float,
    per: float,
    between: tuple[float, float],
    parameters: float | None = None,
    most: Callable[[Any], Any] | None = None,
) -> Array:
    """Return N*, D* and the best setting of a compute, (R, 3), by published parameters, (R, p).

    The setting is the law's CHOICE; between: where it is looked for; parameters: N, if it is held;
    most: the log of the largest N, of the log of the setting.
    Found by bisection of the exact slope, as N* for each setting: one minimum is assumed.
    """
    budget = np.log([flops / per])
    theta = form.internal(form.vector(values), dict.fromkeys(form.columns, 0.0)).astype(complex)
    low, high = (np.full((len(theta), 1), np.log(end)) for end in between)

    def size(x: Array) -> Array:
        if parameters is not None:
            return np.full_like(x.real, np.log(parameters))
        at = {form.CHOICE: np.exp(x.real)}
        n = np.log(compute_optimal(form, values, flops, per, **at)[0])
        # N* moves no loss; a bound that moves with the setting does, by its imaginary part.
        return n if most is None else np.where(most(x.real) < n, most(x), n)

    for _ in range(40):
        x = (low + high) / 2
        aside = x + _STEP * 1j
        logs = {"parameters": size(aside), form.CHOICE: aside}
        falls = _along(form, theta, budget, logs)[0].imag < 0
        low, high = np.where(falls, x, low), np.where(falls, high, x)
    logs = {"parameters": size(x), form.CHOICE: x}
    return np.exp(np.hstack((logs["parameters"], _along(form, theta, budget, logs)[1], x)))
