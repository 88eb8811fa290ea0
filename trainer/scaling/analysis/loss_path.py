"""The loss of a law as a function of compute alone, and the compute that a loss needs.

    along the optimum    N* = k C^a by the law itself, for laws whose optimum is a power law of C
    at a fixed D/N       N = sqrt(C / (k D/N)), for models that are trained beyond the optimum

Invariant: loss falls as C grows, so that the compute of a loss is unique; it is found by bisection.
"""

from dataclasses import dataclass

import numpy as np

from forescale.scaling.fitting import laws
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.points import Array

BEYOND = 1e6  # compute is looked for up to this many times below and above the runs
_STEPS = 50  # of the bisection


@dataclass(frozen=True)
class LossPath:
    """The loss of a law as a function of C alone, and its inverse.

    per_token: FLOPs per parameter and token; ratio: D/N, or None for the law's own optimum;
    least, greatest: ends of log C between which the inverse is looked for. Raises UserError for a
    law whose optimum is no power law of C.
    """

    form: Form
    per_token: float
    ratio: float | None
    least: float
    greatest: float

    def log_loss(self, values: Array, log_c: Array) -> Array:
        """Return log loss, (R, m), by published parameters, (R, p), at log C, (m,) or (R, m)."""
        return self._log_loss(values, self._line(values), log_c)

    def log_compute(self, values: Array, loss: Array) -> Array:
        """Return log C at which each law has these losses, (R, m), for losses (m,).

        It is `least` or `greatest` where the law has the loss at no C between them.
        """
        shape, line = (len(values), len(loss)), self._line(values)
        low, high, aim = np.full(shape, self.least), np.full(shape, self.greatest), np.log(loss)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            above = self._log_loss(values, line, middle) > aim
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        low[high >= self.greatest] = self.greatest  # never reached
        low[low <= self.least] = self.least
        return low

    def _log_loss(self, values: Array, line: tuple[Array, Array], log_c: Array) -> Array:
        if self.form.columns == ("flops",):
            columns = {"flops": np.exp(log_c)}
        else:
            level, slope = line
            log_n = level + slope * log_c
            columns = {"parameters": np.exp(log_n), "tokens": np.exp(self._log_nd(log_c) - log_n)}
        found: Array = np.log(self.form.predict(values, **columns))
        return found

    def _log_nd(self, log_c: Array) -> Array:
        found: Array = log_c - np.log(self.per_token)
        return found

    def _line(self, values: Array) -> tuple[Array, Array]:
        """Return level and slope of log N = level + slope log C along the path, (R, 1) each."""
        ones = np.ones((len(values), 1))
        if self.form.columns == ("flops",):
            return ones, ones
        if self.ratio is not None:
            return (self._log_nd(0 * ones) - np.log(self.ratio)) / 2, ones / 2
        middle = (self.least + self.greatest) / 2
        best, _ = laws.compute_optimal(self.form, values, np.exp(middle), self.per_token)
        slope = laws.allocation(self.form, values)[:, None]
        return np.log(best) - slope * middle, slope
