"""The simple forecasts that a method must beat, from the lowest run of each budget alone."""

from collections.abc import Callable

import numpy as np

from forescale.errors import UserError
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.points import Array, Points

LINE, FRONTIER = "line", "L(C)"


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
