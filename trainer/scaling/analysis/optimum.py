"""The best N and D of a compute: what a target has that gives its FLOPs alone.

    law        N* where the fitted law is lowest along N D = C / per
    parabolas  the power law through the vertices of the budgets' parabolas (fitting/isoflop.py)
    shape      N* of the form whose levels are free in each budget (forecasting/shape.py)

N* is the geometric mean of those that the runs give. Judged by the parabolas of later budgets on
nine public tables, the mean is nearer than the best of the three at every distance: 10 to 40 times
beyond, it errs by 0.26 of log N, and they by 0.28 to 0.33. D* is C / (per N*).

Invariant: runs without parabolas or shape have the law's N*, with its resampled interval.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from forescale.scaling.fitting import laws
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Array, spent

if TYPE_CHECKING:
    from forescale.scaling.analysis.table_fit import StudyFit

# The deviation of log N*: NEAR within the runs, PER_DECADE * decades^POWER beyond, and APART of the
# deviation of the parts. On the nine tables 90 % intervals cover 85 to 96 % at every distance, and
# 50 % ones 49 to 56 %.
NEAR, PER_DECADE, POWER, APART = 0.08, 0.18, 0.8, 0.5
_FREEDOM = 4  # of Student's t

Interval = tuple[float, float]


@dataclass(frozen=True)
class Optimum:
    """N* and D* of a compute, their intervals, and N* by each part."""

    parameters: float
    tokens: float
    sizes: tuple[Interval, Interval]
    parts: dict[str, float]


def optimum(study: "StudyFit", flops: float, level: float) -> Optimum:
    """Return N* and D* of `flops`, for a law of N and D without further columns."""
    per = study.points.per_token
    law = laws.compute_optimal(study.form, study.fit.vector, flops, per)
    parts = {"law": float(law[0][0])}
    if isinstance(iso := study.isoflop, IsoFlop):
        parts["parabolas"] = float(iso.parameters(flops))
    if study.forecaster is not None:
        parts["shape"] = float(np.exp(study.forecaster.shape.optimum(np.log(flops))))
    if len(parts) == 1:
        return Optimum(parts["law"], float(law[1][0]), _resampled(study, flops, level), parts)
    logs = np.log(list(parts.values()))
    n = float(np.exp(logs.mean()))
    decades = max(0.0, float(np.log10(flops / spent(study.points).max())))
    deviation = np.sqrt(NEAR**2 + (PER_DECADE * decades**POWER) ** 2 + APART**2 * logs.var())
    half = float(np.exp(stdtrit(_FREEDOM, (1 + level) / 2) * deviation))
    d = flops / (per * n)
    return Optimum(n, d, ((n / half, n * half), (d / half, d * half)), parts)


def _resampled(study: "StudyFit", flops: float, level: float) -> tuple[Interval, Interval]:
    def best(values: Array) -> Array:
        each = laws.compute_optimal(study.form, values, np.array([flops]), study.points.per_token)
        return np.stack([x[..., 0] for x in each], axis=-1)

    (low_n, low_d), (high_n, high_d) = study.replicates.interval(level, best)
    return (float(low_n), float(high_n)), (float(low_d), float(high_d))
