"""Profile intervals: how far a parameter can go before the fit of all others becomes clearly worse.

    profile     objective(v) = the least objective of a fit with this parameter held at v
    statistic   2 (objective(v) - objective) B / A, with A the mean square of the objective's
                derivative at the residuals (n - p of them) and B the mean of its second derivative;
                for least squares it is that of the likelihood ratio with an unknown variance
    interval    all v whose statistic is below the quantile of F(1, n - p)

The statistic for Huber's function is that of Heritier and Ronchetti 1994 (JASA 89, 897).
Invariant: an end at which the range of the parameter ends first is open (None): the runs don't
determine the parameter on that side. A bootstrap interval ends there too, and doesn't say so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri

from forescale.ground.errors import UserError
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.forms import EXPONENTS, PowerSum

_STEP = 1.5  # factor of the distance from the estimate while an end is looked for
_FIRST = 0.01  # first distance, relative to the estimate
_PRECISE = 1e-3  # precision of an end, relative to its distance from the estimate
_LEAST = 1e-6  # share of the lowest loss that stands for no irreducible loss at all


@dataclass(frozen=True)
class Profile:
    """The profile interval of a parameter; an open end is None."""

    symbol: str
    value: float
    low: float | None
    high: float | None


def profiles(law: Fit, level: float) -> list[Profile]:
    """Return the profile interval of each exponent and of the irreducible loss.

    Coefficients have none: by themselves, without their exponent, they mean nothing. Raises
    UserError for least absolute deviations, whose second derivative is zero, for a law that is no
    sum of power laws, and if no run is left to tell the scatter.
    """
    form, n = law.form, int((law.weights > 0).sum())
    if not isinstance(form, PowerSum):
        raise UserError(form.name, "is no sum of power laws", "profile another law")
    if law.objective.delta == 0:
        problem = "least absolute deviations have no profile interval"
        raise UserError("delta=0", problem, "give delta=1e-3, or delta=null for least squares")
    if n <= form.size:
        problem = f"{n} runs leave none to tell the scatter of {form.size} parameters"
        raise UserError(law.points.where, problem, "add runs")
    limit = float(fdtri(1, n - form.size, level)) / _scale(law)
    lowest, intervals = float(law.points.loss.min()), list[Profile]()
    for symbol in (*(t.coefficient for t in form.terms if not t.exponent), *form.exponents):

        def rise(at: float, symbol: str = symbol) -> float:
            held = fit(form, law.points, law.objective, law.weights, {symbol: at})
            return held.value - law.value - limit

        ends = EXPONENTS
        if symbol not in form.exponents:
            ends = _LEAST * lowest, lowest * (1 - _LEAST)
        value = min(max(law.values[symbol], ends[0]), ends[1])
        low, high = (_end(rise, value, end) for end in ends)
        intervals.append(Profile(symbol, value, low, high))
    return intervals


def _scale(law: Fit) -> float:
    """Return the factor from a rise of the objective to the statistic."""
    w, goal = law.weights, law.objective
    r = law.residuals
    if goal.on == "loss":
        r = law.points.loss * -np.expm1(-r)
    used = w > 0
    n, p = int(used.sum()), law.form.size
    w = w[used] / w[used].mean()
    size = float((w**2 * np.clip(r[used], -goal.delta, goal.delta) ** 2).sum()) / (n - p)
    bend = float((w * (np.abs(r[used]) <= goal.delta)).mean())
    if not size > 0 or not bend > 0:
        problem = "the scatter of its residuals can't be told"
        raise UserError(law.points.where, problem, "give a larger delta, or delta=null")
    return 2 * bend / size / float(law.weights[used].mean())


def _end(rise: Callable[[float], float], value: float, end: float) -> float | None:
    """Return where `rise` becomes positive between the estimate and the end of the range. None if
    it doesn't. The profile is taken to rise once, from the estimate outwards."""
    whole = end - value
    if whole == 0 or rise(end) <= 0:
        return None
    inside, outside = 0.0, whole
    step = np.copysign(_FIRST * max(abs(value), _FIRST * abs(whole)), whole)
    while abs(step) < abs(whole):
        if rise(value + step) > 0:
            outside = step
            break
        inside, step = step, step * _STEP
    while abs(outside - inside) > _PRECISE * abs(outside):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rise(value + middle) > 0 else (middle, outside)
    return float(value + (inside + outside) / 2)
