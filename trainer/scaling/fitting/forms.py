"""The laws: loss as a function of size, data and compute, with the derivatives that a fit needs.

    internal     theta, (R, p): logarithms of the coefficients at the centre of the data, exponents
                 as they are. R replicates are evaluated at once
    published    values, (R, p): the same parameters as their papers print them, in `symbols`' order

Invariant: internal and published are one-to-one. A form works in log loss, m = log L, and on
x = log N, log D, log C minus their centre, which takes the condition number of the Hessian from
millions to thousands. `evaluate` is analytic, so that a complex step gives exact derivatives.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from forescale.errors import UserError
from forescale.scaling.fitting.points import Array, Points

EXPONENTS = (1e-4, 5.0)  # least and greatest
FADED = np.log(1e-12)  # of a term: it is gone once it makes up so little of the loss at the centre
_STEP = 1e-30  # imaginary


@dataclass(frozen=True)
class Design:
    """The centred logarithms of the columns that a form needs, (n,) each, and their centres."""

    logs: dict[str, Array]
    centre: dict[str, float]


def design(form: "Form", points: Points) -> Design:
    """Raises UserError where a column is missing."""
    logs = {c: points.log(c) for c in form.columns}
    centre = {c: float(x.mean()) for c, x in logs.items()}
    return Design({c: x - centre[c] for c, x in logs.items()}, centre)


@dataclass(frozen=True)
class Form(ABC):
    """A law. symbols: its parameters as the source names them; columns: of the points that it
    reads; exponents: those symbols that a profile grid runs over."""

    name: str
    source: str
    symbols: tuple[str, ...]
    columns: tuple[str, ...]
    exponents: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.symbols)

    @abstractmethod
    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        """Of theta (R, p): log loss (R, n) and its derivatives by theta (R, p, n)."""

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        """Sum over runs of pull (R, n) times the second derivatives of log loss: (R, p, p). By a
        complex step in the first derivatives (Squire and Trapp 1998): exact, no cancellation."""
        found = np.empty((len(theta), self.size, self.size))
        for j in range(self.size):
            aside = theta.astype(complex)
            aside[:, j] += 1j * _STEP
            turned = self.evaluate(aside, at)[1].imag / _STEP
            found[:, :, j] = (turned @ pull[:, :, None])[:, :, 0]
        return (found + found.swapaxes(1, 2)) / 2

    @abstractmethod
    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        """The least and the greatest theta, (p,) each."""

    @abstractmethod
    def axes(self) -> tuple[Array, ...]:
        """Values of each of `exponents` for the profile grid."""

    def grid(self) -> Array:
        """All combinations, (G, q)."""
        return np.array(list(product(*self.axes())))

    @abstractmethod
    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        """With the exponents fixed, L to a power is linear in positive coefficients: the basis
        (G, K, n) and the power (G,)."""

    @abstractmethod
    def assemble(self, grid: Array, coefficients: Array) -> Array:
        """theta (G, p) of exponents (G, q) and positive coefficients (G, K)."""

    @abstractmethod
    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        """Of theta (R, p) on columns with these centres: values (R, p)."""

    @abstractmethod
    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        """Of values (R, p): theta (R, p)."""

    def vector(self, values: Mapping[str, float] | ArrayLike) -> Array:
        """Published parameters as (..., p), in `symbols`' order. Raises UserError for others."""
        if not isinstance(values, Mapping):
            return np.asarray(values, dtype=float)
        if set(values) != set(self.symbols):
            what = f"its parameters are {', '.join(self.symbols)}, not {', '.join(values)}"
            raise UserError(self.name, what, "give each of them once")
        return np.array([values[s] for s in self.symbols], dtype=float)

    def predict(self, values: Mapping[str, float] | ArrayLike, **columns: ArrayLike) -> Array:
        """Loss of published parameters (..., p) for m runs given by columns (parameters=, tokens=,
        flops=, unique_tokens=): (..., m)."""
        vector = self.vector(values)
        given = {k: np.log(np.atleast_1d(np.asarray(v, dtype=float))) for k, v in columns.items()}
        if missing := set(self.columns) - set(given):
            what = f"it predicts from {', '.join(self.columns)}, and has no {', '.join(missing)}"
            raise UserError(self.name, what, "give every one of them")
        logs = dict(zip(given, np.broadcast_arrays(*given.values()), strict=True))
        zero = dict.fromkeys(self.columns, 0.0)
        theta = self.internal(vector.reshape(-1, self.size), zero)
        m, _ = self.evaluate(theta, Design(logs, zero))
        return np.exp(m).reshape(*vector.shape[:-1], -1)


@dataclass(frozen=True)
class Term:
    """coefficient * column ** -exponent, or the coefficient alone."""

    coefficient: str
    exponent: str = ""
    column: str = ""


@dataclass(frozen=True)
class PowerSum(Form):
    """A sum of power laws with positive coefficients. Two terms may share an exponent."""

    terms: tuple[Term, ...] = ()

    def _places(self) -> list[tuple[int, int]]:
        """Of each term's coefficient and exponent among the symbols; -1: it has no exponent."""
        of = {s: i for i, s in enumerate(self.symbols)} | {"": -1}
        return [(of[t.coefficient], of[t.exponent]) for t in self.terms]

    def logs(self, theta: Any, at: Design) -> dict[str, Any]:
        """Log of each term's column, (n,) or (R, n)."""
        return at.logs

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        places, logs = self._places(), self.logs(theta, at)
        n = next(iter(at.logs.values())).shape[-1]
        jacobian = np.zeros((len(theta), self.size, n), dtype=theta.dtype)
        for term, (c, e) in zip(self.terms, places, strict=True):
            log = theta[:, c, None] - (theta[:, e, None] * logs[term.column] if e >= 0 else 0.0)
            jacobian[:, c] = np.exp(log)
        total = sum(jacobian[:, c] for c, _ in places)
        share = 1 / total
        for term, (c, e) in zip(self.terms, places, strict=True):
            jacobian[:, c] *= share
            if e >= 0:
                jacobian[:, e] -= jacobian[:, c] * logs[term.column]
        return np.log(total), jacobian

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        """In closed form: each term's log is linear in theta, with gradient u, and the log of their
        sum has the Hessian sum(share * u u') - J J'."""
        found = -(jacobian * pull[:, None]) @ jacobian.swapaxes(1, 2)
        for term, (c, e) in zip(self.terms, self._places(), strict=True):
            drawn = jacobian[:, c] * pull
            found[:, c, c] += drawn.sum(-1)
            if e >= 0:
                x = at.logs[term.column]
                first, second = drawn @ x, drawn @ x**2
                found[:, c, e] -= first
                found[:, e, c] -= first
                found[:, e, e] += second
        return found

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        middle, (least, most) = float(np.median(log_loss)), EXPONENTS
        of = {t.coefficient for t in self.terms}
        low = [middle + FADED if s in of else least for s in self.symbols]
        high = [middle + 10 if s in of else most for s in self.symbols]
        return np.array(low), np.array(high)

    def axes(self) -> tuple[Array, ...]:
        count = {1: 48, 2: 20}.get(len(self.exponents), 10)
        return (np.geomspace(0.04, 1.6, count),) * len(self.exponents)

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        of = {s: i for i, s in enumerate(self.exponents)}
        n = next(iter(at.logs.values())).shape[-1]
        found = np.ones((len(grid), len(self.terms), n))
        for k, term in enumerate(self.terms):
            if term.exponent:
                found[:, k] = np.exp(-grid[:, of[term.exponent], None] * at.logs[term.column])
        return found, np.ones(len(grid))

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        of = {s: grid[:, i] for i, s in enumerate(self.exponents)}
        of |= {t.coefficient: np.log(coefficients[:, k]) for k, t in enumerate(self.terms)}
        return np.stack([of[s] for s in self.symbols], axis=1)

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        values = theta.copy()
        for term, (c, e) in zip(self.terms, self._places(), strict=True):
            shift = theta[:, e] * centre[term.column] if e >= 0 else 0.0
            values[:, c] = np.exp(theta[:, c] + shift)
        return values

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        theta = np.array(values, dtype=float)
        with np.errstate(divide="ignore"):  # a coefficient of zero is a term that isn't there
            for term, (c, e) in zip(self.terms, self._places(), strict=True):
                shift = theta[:, e] * centre[term.column] if e >= 0 else 0.0
                theta[:, c] = np.maximum(np.log(values[:, c]), -200) - shift
        return theta
