"""Doubts about the compute-optimal N and D: the law and the parabolas, compared.

    optimum_doubts   the law, the parabolas' power law and their vertices differ beyond their
                     intervals, or the vertices are on no power law
    order_doubts     the law doesn't tell which runs of a budget are better than others

Invariant: N* by the law is its lowest loss along the runs of a budget, as they count C. So another
convention of C is no disagreement.
"""

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from forescale.scaling.fitting.bootstrap import Replicates
from forescale.scaling.fitting.fit import Fit
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Array, Points

# Differences of the exponent and of N* that matter to nobody, however sure they are.
_SLIGHT = (0.02, np.log(1.1))
_TURN = 0.1  # change of the exponent of N* along the vertices, from which they are no power law
_SURE = 0.999  # probability of a smaller bend of the vertices by chance, to each side
# Least correlation of the ranks of observed and fitted losses within budgets. Nine public tables
# have 0.83 to 0.99; with their losses shuffled within budgets, -0.2 to 0.25.
_ORDERED = 0.5


def optimum_doubts(
    replicates: Replicates, iso: IsoFlop, flops: float | None = None, level: float = 0.9
) -> list[str]:
    """Return a sentence if the law and the parabolas disagree on N* beyond their intervals, and one
    if the vertices bend away from their power law.

    They are compared in their exponents, and in N* at `flops` or the greatest budget. Those of the
    law are of the line through its log N* of the budgets.
    """
    if replicates.fit.form.columns != ("parameters", "tokens"):
        return _bend(iso)
    at = float(flops) if flops and np.isfinite(flops) else iso.vertices[-1].budget
    log_c = np.log([v.budget for v in iso.vertices])
    away = log_c - log_c.mean()

    def of(values: Array) -> Array:
        """Return the exponent and log N* at `at`, (R, 2)."""
        best = _along(replicates, iso, values)
        slope = best @ away / (away @ away)
        return np.stack((slope, best.mean(1) + slope * (np.log(at) - log_c.mean())), axis=-1)

    # Value, low and high end of the exponent and of log N*, (3, 2); without an interval of the
    # parabolas, its ends are the value.
    law = np.vstack((of(replicates.fit.vector[None]), replicates.interval(level, of)))
    line = iso.parameters
    value = np.array([line.a, np.log(line(at))])
    exponent, n = line.interval(level)[:, 1], np.log(line.interval(level, [at])[:, 0])
    ends = np.stack((exponent, n), axis=1)
    parabolas = np.vstack((value, np.where(np.isfinite(ends), ends, value)))
    apart = (law[1] > parabolas[2]) | (parabolas[1] > law[2])
    apart &= np.abs(law[0] - parabolas[0]) > _SLIGHT
    if not apart.any():
        return _bend(iso)
    parts = []
    for i, quantity in ((1, f"at {at:.3g} FLOPs N* is"), (0, "the exponent of N* is")):
        if apart[i]:
            texts = ["{:.3g} ({:.3g} to {:.3g})".format(*np.exp(one[:, i])) if i else
                     "{:.3f} ({:.3f} to {:.3f})".format(*one[:, i])
                     for one in (law, parabolas)]  # fmt: skip
            parts.append(f"{quantity} {texts[0]} by the law and {texts[1]} by the parabolas")
    low, high = replicates.interval(level, lambda values: _along(replicates, iso, values))
    log_n = np.log([v.parameters for v in iso.vertices])
    outside = int(((log_n < low) | (log_n > high)).sum())
    return [
        f"The law and the parabolas disagree on the optimum beyond their {level:.0%} intervals: "
        f"{'; '.join(parts)}; {outside} of {len(log_n)} vertices are outside the law's interval. "
        "Fit both with near=0.02, to runs nearer the optimum; if they disagree still, trust N* and "
        "D* only as far as both agree.",
        *_bend(iso),
    ]


def _along(replicates: Replicates, iso: IsoFlop, values: Array) -> Array:
    """Return log N of the law's lowest loss along the runs of each budget, (R, B).

    Beyond the sizes of a budget its line of log D over log N is continued straight.
    """
    away = np.linspace(-8, 8, 161)
    best = np.empty((len(values), len(iso.vertices)))
    for b, v in enumerate(iso.vertices):
        n = v.parameters * np.exp(away)
        d = v.tokens * np.exp(v.path[-2] * away)
        loss = replicates.fit.form.predict(values, parameters=n, tokens=d)
        i = np.clip(loss.argmin(1), 1, len(away) - 2)
        low, mid, high = (loss[np.arange(len(values)), i + k] for k in (-1, 0, 1))
        bend = np.maximum(low - 2 * mid + high, 1e-300)
        shift = np.clip((low - high) / (2 * bend), -1, 1) * (away[1] - away[0])
        best[:, b] = np.log(v.parameters) + away[i] + shift
    return best


def _bend(iso: IsoFlop) -> list[str]:
    """Return a sentence if N* of the vertices is clearly no power law of C."""
    x, y = np.log([(v.budget, v.parameters) for v in iso.vertices]).T
    if len(x) < 5:
        return []
    X = np.vander(x - x.mean(), 3)
    fitted, *_ = np.linalg.lstsq(X, y)
    rest = y - X @ fitted
    error = np.sqrt(rest @ rest / (len(x) - 3) * np.linalg.inv(X.T @ X)[0, 0])
    first, last = (fitted[1] + 2 * fitted[0] * (end - x.mean()) for end in (x.min(), x.max()))
    if abs(fitted[0]) < stdtrit(len(x) - 3, _SURE) * error or abs(last - first) < _TURN:
        return []
    return [
        f"N* of the {len(x)} vertices is no power law of C: its exponent goes from {first:.2f} at "
        f"{np.exp(x.min()):.2g} FLOPs to {last:.2f} at {np.exp(x.max()):.2g}. Fit the larger "
        "budgets alone before extrapolating N*."
    ]


def order_doubts(points: Points, budgets: Array, law: Fit) -> list[str]:
    """Return a sentence if the law doesn't tell which runs of a budget are better than others.

    budgets: of each run, (n,). Budgets with fewer than four runs don't count.
    """
    if not {"parameters", "tokens"} >= set(law.form.columns):
        return []
    fitted = law.predict(**{c: getattr(points, c) for c in law.form.columns})
    losses = pd.DataFrame({"observed": points.loss, "fitted": fitted})
    groups = losses.groupby(budgets)
    ranks = groups.rank()
    size = groups["observed"].transform("size")
    ranks = (ranks - ranks.groupby(budgets).transform("mean")).div(size, axis=0)[size > 3]
    if ranks.empty:
        return []
    observed, expected = ranks.to_numpy().T
    scale = np.sqrt((observed @ observed) * (expected @ expected))
    alike = float(observed @ expected / scale) if scale else 0.0
    if alike >= _ORDERED:
        return []
    return [
        f"Within the {len(np.unique(budgets[size > 3]))} budgets, losses don't follow the law: the "
        f"correlation of observed and fitted ranks is {alike:.2f}, where 1 is perfect, so that N* "
        "and D* mean nothing. Check that N, D and loss of a row belong to the same run, and add "
        "sizes farther from N*."
    ]
