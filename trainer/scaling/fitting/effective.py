"""Laws of repeated tokens and of few bits: Chinchilla's on an effective N or D, or one term more.

Invariant: further parameters of an effective column are positive, and logarithms in theta.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from forescale.scaling.fitting.forms import Design, Features, Form, PowerSum, Term
from forescale.scaling.fitting.points import ONCE, Array

R_D, R_N = 15.387756, 5.309743  # of repeated data: Muennighoff et al. 2023, appendix A
_SPENT = 50.0  # of log N over V: parameters beyond it are worth nothing
_FIRST = 5  # index of the first parameter that Chinchilla's law doesn't have
_SYMBOLS = ("A", "B", "E", "alpha", "beta")
_TERMS = (Term("A", "alpha", "parameters"), Term("B", "beta", "tokens"), Term("E"))


@dataclass(frozen=True)
class Effective(PowerSum):
    """The Chinchilla law on an effective N or D."""

    EXPONENT: ClassVar[int]  # index in `symbols`, that of the coefficient is 3 less
    LIMITS: ClassVar[tuple[float, float]]  # of each further parameter

    @abstractmethod
    def effective(self, logs: Any, at: Design) -> tuple[Any, Any]:
        """Return the centred log of the effective column, (R, n), and its derivatives by the logs
        of the further parameters, (R, q, n). logs: (R, q)."""

    def _with(self, logs: Any, at: Design) -> tuple[Design, Any]:
        log, slopes = self.effective(logs, at)
        column = self.terms[self.EXPONENT - 3].column
        return Design({**at.logs, column: log}, at.centre), slopes

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        e, (there, slopes) = self.EXPONENT, self._with(theta[:, _FIRST:], at)
        m, jacobian = super().evaluate(theta, there)
        jacobian[:, _FIRST:] = -theta[:, e, None, None] * jacobian[:, e - 3, None] * slopes
        return m, jacobian

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        return Form.curvature(self, theta, at, jacobian, pull)  # by a complex step

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        low, high = super().bounds(at, log_loss)
        low[_FIRST:], high[_FIRST:] = np.log(self.LIMITS)
        return low, high

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        return super().basis(grid, self._with(np.log(grid[:, 2:]), at)[0])

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        return np.hstack((np.log(coefficients), grid[:, :2], np.log(grid[:, 2:])))

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        values = super().published(theta, centre)
        values[:, _FIRST:] = np.exp(theta[:, _FIRST:])
        return values

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        theta = super().internal(values, centre)
        theta[:, _FIRST:] = np.log(np.asarray(values)[:, _FIRST:])
        return theta


@dataclass(frozen=True)
class DataConstrained(Effective):
    """The Chinchilla law on effective data, for training on repeated tokens.

    D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)): the value of a token falls each time it is
    repeated. Where tokens repeat, so does the value of parameters beyond V, whose D* is U: N' is
    the same of N, V and R_N. R_N is held at the source's, which holds all else: few runs tell it
    from R_D. Without it, runs along budgets of the source's law give an R_D of 4, not 15.
    """

    EXPONENT = 4
    LIMITS = (1e-2, 1e4)

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        (a, b, _, alpha, beta), n = theta[:, :5, None].swapaxes(0, 1), at.logs["parameters"]
        unique = at.logs["unique_tokens"] + at.centre["unique_tokens"] - at.centre["tokens"]
        v = (np.log(alpha / beta) + a - b + beta * unique) / alpha  # centred, as n is
        fades = (at.logs["tokens"] > unique + np.log(ONCE)) & (n > v)
        ratio = np.exp(np.minimum(np.where(fades, n - v, 0), _SPENT))
        worth = 1 - R_N * np.expm1((1 - ratio) / R_N)
        faded = np.where(fades, v + np.log(worth), n)
        m, jacobian = super().evaluate(theta, Design({**at.logs, "parameters": faded}, at.centre))
        slope = np.where(fades, 1 - ratio * np.exp((1 - ratio) / R_N) / worth, 0)
        by_v = -jacobian[:, 0] * slope  # times alpha, by which those of v are divided
        for i, by in ((0, 1), (1, -1), (3, 1 / alpha - v), (4, unique - 1 / beta)):
            jacobian[:, i] += by_v * by
        return m, jacobian

    def effective(self, logs: Any, at: Design) -> tuple[Any, Any]:
        tokens, unique = (at.logs[c] + at.centre[c] for c in ("tokens", "unique_tokens"))
        unique = np.minimum(tokens, unique)
        again = np.expm1(tokens - unique)  # repetitions
        r = np.exp(logs)
        faded = np.exp(-again / r)
        worth = 1 + r * (1 - faded)
        slope = (r * (1 - faded) - again * faded) / worth
        return unique - at.centre["tokens"] + np.log(worth), slope[:, None]


DATA_CONSTRAINED = DataConstrained(
    "data-constrained",
    "Muennighoff et al. 2023, arXiv 2305.16264, eq. 5 and 6",
    (*_SYMBOLS, "R_D"),
    ("parameters", "tokens", "unique_tokens"),
    ("alpha", "beta", "R_D"),
    ((0.06, 1.2, 8), (0.06, 1.2, 8), (1, 100, 5)),
    _TERMS,
)

_PARTS = {"weight_bits": "gamma_w", "activation_bits": "gamma_a", "cache_bits": "gamma_kv"}
_FULL = 16.0  # bits of an operation that counts as one FLOP


@dataclass(frozen=True)
class Precision(Effective):
    """The law of training in few bits: Chinchilla's on N (1 - exp(-P / gamma)), a factor for each
    of weights, activations and the cache of keys and values.

    The column `bits` is P of all three alike, with one gamma; columns of the three, or of some of
    them, have a gamma each.
    """

    EXPONENT = 3
    LIMITS = (0.05, 20.0)
    CHOICE = "bits"
    BETWEEN = (1.0, 32.0)
    PRICED = "C counts an operation of P `bits` as P / 16 FLOPs: it is 6 N D P / 16; else 6 N D."

    def suited(self, columns: Collection[str]) -> Form:
        parts = [c for c in _PARTS if c in columns]
        if "bits" in columns or not parts:
            return self
        gammas = tuple(_PARTS[c] for c in parts)
        return replace(
            self, symbols=(*_SYMBOLS, *gammas), columns=("parameters", "tokens", *parts),
            exponents=("alpha", "beta", *gammas),
            ranges=((0.06, 1.2, 8),) * 2 + ((0.5, 5, 6 - len(parts)),) * len(parts),
        )  # fmt: skip

    def log_cost(self, logs: Mapping[str, Any]) -> Any:
        return logs["bits"] - np.log(_FULL) if "bits" in logs else 0.0

    def effective(self, logs: Any, at: Design) -> tuple[Any, Any]:
        log, slopes = at.logs["parameters"], []
        for i, column in enumerate(self.columns[2:]):
            power = len(_PARTS) if column == "bits" else 1
            share = np.exp(at.logs[column] + at.centre[column] - logs[:, i, None])  # P / gamma
            log = log + power * np.log(-np.expm1(-share))
            slopes.append(-power * share / np.expm1(share))
        return log, np.stack(slopes, axis=1)


PRECISION = Precision(
    "precision",
    "Kumar et al. 2024, arXiv 2411.04330, eq. 3 to 5",
    (*_SYMBOLS, "gamma"),
    ("parameters", "tokens", "bits"),
    ("alpha", "beta", "gamma"),
    ((0.06, 1.2, 8), (0.06, 1.2, 8), (0.5, 8, 6)),
    _TERMS,
)


@dataclass(frozen=True)
class Quantised(PowerSum):
    """The law of models whose weights are quantised after training: Chinchilla's, plus

    C_T D^gamma_D N^-gamma_N exp(-P / gamma_post), with `post_bits` P. In theta, gamma_post is
    1 / gamma_post, and N and D are not centred in this term.
    """

    def features(self, logs: Mapping[str, Any], centre: Mapping[str, float]) -> Features:
        n, d, bits = (logs[c] + centre[c] for c in self.columns)
        return super().features(logs, centre) | {5: [(6, d), (7, -n), (8, -np.exp(bits))]}

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        values = super().published(theta, centre)
        values[:, 8] = 1 / theta[:, 8]
        return values

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        theta = super().internal(values, centre)
        theta[:, 8] = 1 / theta[:, 8]
        return theta


QUANTISED = Quantised(
    "quantised",
    "Kumar et al. 2024, arXiv 2411.04330, eq. 2",
    (*_SYMBOLS, "C_T", "gamma_D", "gamma_N", "gamma_post"),
    ("parameters", "tokens", "post_bits"),
    ("alpha", "beta", "gamma_D", "gamma_N", "gamma_post"),
    ((0.1, 1.0, 6), (0.1, 1.0, 6), (0.2, 1.0, 3), (0.2, 1.0, 3), (0.5, 4.0, 4)),
    (*_TERMS, Term("C_T")),
)
