"""Forms of laws: loss as a function of N, D and C, with the derivatives that a fit needs.

    internal     theta, (R, p): logarithms of the coefficients at the centre of the data, and the
                 exponents unchanged; R replicates are evaluated at once
    published    values, (R, p): the same parameters as papers print them, in the order of `symbols`

Invariant: internal and published parameters map one-to-one. A form computes log loss, m = log L,
from x = log N, log D, log C minus their centre, which lowers the condition number of the Hessian
from millions to thousands. `evaluate` is analytic, so that a complex step gives exact derivatives.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from forescale.ground.errors import UserError
from forescale.scaling.fitting.points import SETTINGS, Array, Points

EXPONENTS = (1e-4, 5.0)  # the least and the greatest
FADED = np.log(1e-12)  # a term with this log share of the loss at the centre counts as absent
_STEP = 1e-30  # size of the imaginary step
Features: TypeAlias = dict[int, list[tuple[int, Any]]]


@dataclass(frozen=True)
class Design:
    """The centred logarithms of the columns that a form needs, (n,) each, and their centres."""

    logs: dict[str, Array]
    centre: dict[str, float]


def design(form: "Form", points: Points) -> Design:
    """Return the design of a form for these points. Raises UserError if a column is missing."""
    logs = {c: points.log(c) for c in form.columns}
    centre = {c: float(x.mean()) for c, x in logs.items()}
    return Design({c: x - centre[c] for c, x in logs.items()}, centre)


@dataclass(frozen=True)
class Form(ABC):
    """The form of a law. The methods of each form are documented here. symbols: its p parameters as
    the source names them; columns: those of Points that it reads; exponents: the q symbols that a
    profile grid runs over; ranges: the first and last value of each there, and their number."""

    name: str
    source: str
    symbols: tuple[str, ...]
    columns: tuple[str, ...]
    exponents: tuple[str, ...]
    ranges: tuple[tuple[float, float, int], ...]
    # The setting whose best value of a compute can be found, and where it is looked for; a bound
    # that is None is that of the runs.
    CHOICE: ClassVar[str] = ""
    BETWEEN: ClassVar[tuple[float | None, float | None]] = (None, None)
    PRICED: ClassVar[str] = ""  # how C is counted, if it is 6 N D times what settings cost

    def suited(self, columns: Collection[str]) -> "Form":
        """Return the form of this law that reads these columns of a table."""
        return self

    def log_cost(self, logs: Mapping[str, Any]) -> Any:
        """Return the log of C / 6 N D of runs by the logs of their columns, if PRICED."""
        return 0.0

    @property
    def settings(self) -> list[str]:
        """Return the columns that a target gives beside N, D and C."""
        return [c for c in self.columns if c in SETTINGS]

    @property
    def size(self) -> int:
        """Return the number of parameters, p."""
        return len(self.symbols)

    @abstractmethod
    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        """Return log loss, (R, n), and its derivatives by theta, (R, p, n), at theta, (R, p)."""

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        """Return the sum over runs of pull, (R, n), times the second derivatives of L over L. These
        are those of m plus J J'; the sum is (R, p, p). By a complex step in the first derivatives
        (Squire and Trapp 1998), which is exact because nothing cancels."""
        total = np.empty((len(theta), self.size, self.size))
        for j in range(self.size):
            aside = theta.astype(complex)
            aside[:, j] += 1j * _STEP
            turned = self.evaluate(aside, at)[1].imag / _STEP
            total[:, :, j] = (turned @ pull[:, :, None])[:, :, 0]
        both = (jacobian * pull[:, None]) @ jacobian.swapaxes(1, 2)
        return (total + total.swapaxes(1, 2)) / 2 + both

    @abstractmethod
    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        """Return the least and the greatest theta, (p,) each."""

    def grid(self) -> Array:
        """Return all combinations of the exponents in the profile grid, (G, q)."""
        return np.array(list(product(*(np.geomspace(*each) for each in self.ranges))))

    @abstractmethod
    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        """Return the basis, (G, K, n), and the power, (G,), at fixed exponents. L to this power is
        the sum of the K basis functions times positive coefficients."""

    @abstractmethod
    def assemble(self, grid: Array, coefficients: Array) -> Array:
        """Return theta, (G, p), of exponents, (G, q), and positive coefficients, (G, K)."""

    @abstractmethod
    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        """Return the published parameters, (R, p), of theta, (R, p), for these centres."""

    @abstractmethod
    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        """Return theta, (R, p), of published parameters, (R, p), for these centres."""

    def summands(self) -> list[tuple[int, int]]:
        """Return the indices of each term's log coefficient and exponent, if terms add up to L. The
        exponent is -1 if a term has none of its own."""
        return []

    def vector(self, values: Mapping[str, float] | ArrayLike) -> Array:
        """Return published parameters in the order of `symbols`, (..., p). Raises UserError for a
        mapping with other names."""
        if not isinstance(values, Mapping):
            return np.asarray(values, dtype=float)
        if set(values) != set(self.symbols):
            problem = f"the parameters are {', '.join(self.symbols)}, not {', '.join(values)}"
            raise UserError(self.name, problem, "give exactly these")
        return np.array([values[s] for s in self.symbols], dtype=float)

    def predict(self, values: Mapping[str, float] | ArrayLike, **columns: ArrayLike) -> Array:
        """Return the loss of m runs, (..., m), by published parameters, (..., p). columns:
        parameters=, tokens= and others of Points, as far as the law reads them.
        Raises UserError if one is missing."""
        vector = self.vector(values)
        inputs = {k: np.log(np.atleast_1d(np.asarray(v, dtype=float))) for k, v in columns.items()}
        if missing := set(self.columns) - set(inputs):
            problem = f"the law reads {', '.join(self.columns)}; missing: {', '.join(missing)}"
            raise UserError(self.name, problem, "give all of them")
        logs = dict(zip(inputs, np.broadcast_arrays(*inputs.values()), strict=True))
        zero = dict.fromkeys(self.columns, 0.0)
        theta = self.internal(vector.reshape(-1, self.size), zero)
        m, _ = self.evaluate(theta, Design(logs, zero))
        return np.exp(m).reshape(*vector.shape[:-1], -1)


@dataclass(frozen=True)
class Term:
    """A term coefficient * column ** -exponent, or a coefficient alone."""

    coefficient: str
    exponent: str = ""
    column: str = ""


@dataclass(frozen=True)
class PowerSum(Form):
    """A sum of power laws with positive coefficients. Two terms may share an exponent."""

    terms: tuple[Term, ...] = ()

    def _places(self) -> list[tuple[int, int]]:
        """Return the indices of each term's coefficient and exponent in `symbols`; -1 for none."""
        of = {s: i for i, s in enumerate(self.symbols)} | {"": -1}
        return [(of[t.coefficient], of[t.exponent]) for t in self.terms]

    def summands(self) -> list[tuple[int, int]]:
        places = self._places()
        exponents = [e for _, e in places]
        return [(c, e if exponents.count(e) == 1 else -1) for c, e in places]

    def features(self, logs: Mapping[str, Any], centre: Mapping[str, float]) -> Features:
        """Return what the log of each term has beside the log of its coefficient: the places in
        theta, each with its factor, (n,) or (R, n), which does not depend on theta."""
        places = zip(self.terms, self._places(), strict=True)
        return {c: [(e, -logs[t.column])] if e >= 0 else [] for t, (c, e) in places}

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        features = self.features(at.logs, at.centre)
        n = next(iter(at.logs.values())).shape[-1]
        jacobian = np.zeros((len(theta), self.size, n), dtype=theta.dtype)
        for c, rows in features.items():
            jacobian[:, c] = np.exp(
                sum((theta[:, i, None] * x for i, x in rows), theta[:, c, None])
            )
        first, *rest = (jacobian[:, c] for c in features)
        total = sum(rest, first)
        share = 1 / total
        for c, rows in features.items():
            jacobian[:, c] *= share
            for i, x in rows:
                jacobian[:, i] += jacobian[:, c] * x
        return np.log(total), jacobian

    def curvature(self, theta: Array, at: Design, jacobian: Array, pull: Array) -> Array:
        """Return the weighted sum of second derivatives in closed form; see Form.curvature. The log
        of a term is linear in theta, with gradient u, so that L, the sum of terms, has the second
        derivatives sum(share * u u') times L."""
        total = np.zeros((len(theta), self.size, self.size))
        for c, rows in self.features(at.logs, at.centre).items():
            drawn = jacobian[:, c] * pull
            total[:, c, c] += drawn.sum(-1)
            for i, x in rows:
                first = drawn @ x
                total[:, c, i] += first
                total[:, i, c] += first
                for j, z in rows:
                    total[:, i, j] += drawn @ (x * z)
        return total

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        middle, (least, most) = float(np.median(log_loss)), EXPONENTS
        of = {t.coefficient for t in self.terms}
        low = [middle + FADED if s in of else least for s in self.symbols]
        high = [middle + 10 if s in of else most for s in self.symbols]
        return np.array(low), np.array(high)

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        of = {self.symbols.index(s): i for i, s in enumerate(self.exponents)}
        features = self.features(at.logs, at.centre)
        n = next(iter(at.logs.values())).shape[-1]
        basis = np.zeros((len(grid), len(features), n))
        for k, rows in enumerate(features.values()):
            for i, x in rows:
                basis[:, k] += grid[:, of[i], None] * x
        return np.exp(basis), np.ones(len(grid))

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
        with np.errstate(divide="ignore"):  # a coefficient of zero: the term is absent
            for term, (c, e) in zip(self.terms, self._places(), strict=True):
                shift = theta[:, e] * centre[term.column] if e >= 0 else 0.0
                theta[:, c] = np.maximum(np.log(values[:, c]), -200) - shift
        return theta
