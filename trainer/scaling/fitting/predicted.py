"""A prediction of log loss with its doubt: what every method of prediction returns."""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from forescale.scaling.fitting.points import Array


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
        found: Array = np.exp(self.log_loss)
        return found

    def half(self, level: float) -> Array:
        """Return half of the width of the interval of log loss, (m,)."""
        found: Array = stdtrit(self.freedom, (1 + level) / 2) * self.deviation
        return found

    def interval(self, level: float) -> Array:
        """Return the low and high ends of the interval of the loss, (2, m)."""
        half = self.half(level)
        found: Array = np.exp(np.stack((self.log_loss - half, self.log_loss + half)))
        return found
