"""A prediction of log loss with its doubt: what every method of prediction returns."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from forescale.errors import UserError
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.points import Array, Points

LEVEL, LAW, LINE, FRONTIER = "level", "law", "line", "L(C)"


@dataclass(frozen=True)
class Predicted:
    """Predicted log losses, (m,), each with Student's t about it.

    deviation: the scale of t, (m,); freedom: its degrees of freedom, one number or (m,).
    """

    log_loss: Array
    deviation: Array
    freedom: Array | float

    @property
    def loss(self) -> Array:
        """Return the median loss, (m,)."""
        return np.exp(self.log_loss)

    def half(self, level: float) -> Array:
        """Return half of the width of the interval of log loss, (m,)."""
        return stdtrit(self.freedom, (1 + level) / 2) * self.deviation

    def interval(self, level: float) -> Array:
        """Return the low and high ends of the interval of the loss, (2, m)."""
        half = self.half(level)
        return np.exp(np.stack((self.log_loss - half, self.log_loss + half)))


def rivals(flops: Array, lowest: Array) -> dict[str, Callable[[float], float]]:
    """Return the rivals by name; each is a function from a budget's C to its lowest loss.

    flops, lowest: C and the lowest loss of each budget, ascending, (B,). LINE: a line in log C and
    log loss through the last two budgets; FRONTIER: a law of three parameters through all of them.
    A rival for which there are too few budgets is absent.
    """
    found: dict[str, Callable[[float], float]] = {}
    if len(flops) >= 2:
        x, y = np.log(flops[-2:]), np.log(lowest[-2:])
        slope = (y[1] - y[0]) / (x[1] - x[0])
        found[LINE] = lambda c: float(np.exp(y[1] + slope * (np.log(c) - x[1])))
    if len(flops) >= laws.FRONTIER.size:
        try:
            law = fit(laws.FRONTIER, Points(lowest, flops=flops))
            found[FRONTIER] = lambda c: float(law.predict(flops=c)[0])
        except UserError:
            pass  # these runs don't determine the law
    return found
