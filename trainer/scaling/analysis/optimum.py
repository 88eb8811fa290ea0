"""The best N and D of a compute: what a target has that gives its FLOPs alone.

    law        N* where the fitted law is lowest along N D = C / per
    parabolas  the power law through the vertices of the budgets' parabolas (fitting/isoflop.py)
    shape      N* of the form whose levels are free in each budget (forecasting/shape.py)

N* is the geometric mean of those that the runs give. Judged by the parabolas of later budgets on
nine public tables, the mean is nearer than the best of the three up to 40 times beyond: at 12 to 40
times it errs by 0.26 of log N, and they by 0.28 to 0.33. D* is C / (per N*).

A model that serves T tokens spends C = per N (D + T / 3), since a forward pass is a third of a
training step (Sardana et al. 2024, arXiv 2401.00448): its best N is smaller, by the ratio that the
law gives. So is that of a model whose tokens repeat (Muennighoff et al. 2023, arXiv 2305.16264),
where parameters fade sooner than tokens. A largest N bounds it.

Invariant: runs without parabolas or shape have the law's N*, with its resampled interval.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from forescale.ground.errors import UserError
from forescale.scaling.config import TargetPoint
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
_LEAST, _GRID = 1e-3, 10_001  # sizes that serve or repeat: from this share of N*, so many
_REPEATED = laws.DATA_CONSTRAINED

Interval = tuple[float, float]


@dataclass(frozen=True)
class Optimum:
    """The best N and D of a compute, and their intervals. parts: N* by each way; empty if serving
    or a largest N has moved it."""

    parameters: float
    tokens: float
    sizes: tuple[Interval, Interval]
    parts: dict[str, float]


def optimum(
    study: "StudyFit", flops: float, level: float, bounds: TargetPoint | None = None
) -> Optimum:
    """Return the best N and D of `flops`, for a law of N, D and what `bounds` holds: settings, and
    `unique`; of N and D alone also `served` and `most_parameters`. Raises UserError if serving
    takes all of `flops`."""
    t = bounds or TargetPoint()
    if study.form.columns != laws.CHINCHILLA.columns:
        held = {name: getattr(t, name) for name in study.form.settings}
        return _of_law(study, flops, level, unique_tokens=t.unique, **held)
    best, served, most = _trained(study, flops, level), t.served, t.most_parameters
    repeats = t.unique is not None and t.unique < best.tokens
    if not served and most is None and not repeats:
        return best
    per, n = study.points.per_token, best.parameters
    if served:
        n = best.parameters * _ratio(study, flops, served)
    if t.unique is not None and flops / (per * n) - served / 3 > t.unique:
        n = best.parameters * _ratio(study, flops, served, t.unique / best.tokens)
    n = n if most is None else min(n, most)
    left = flops / (per * n) - served / 3
    if left <= 0:
        problem = f"pays for serving {served / 3:.3g} of {flops / (per * n):.3g} tokens' worth"
        raise UserError("target.flops", problem, "give more FLOPs, or a smaller target.served")
    ratio, largest = n / best.parameters, np.inf if most is None else most
    low, high = (min(x * ratio, largest) for x in best.sizes[0])
    least, greatest = (max(0.0, flops / (per * x) - served / 3) for x in (high, low))
    return Optimum(n, left, ((low, high), (least, greatest)), {})


def _ratio(study: "StudyFit", flops: float, served: float, share: float = np.inf) -> float:
    """Return by what the law's best N changes if `flops` pays for served tokens too, and if only
    `share` of its D* is unique."""
    per, law, values = study.points.per_token, study.form, study.fit.vector
    start, fresh = (float(x[0]) for x in laws.compute_optimal(law, values, flops, per))
    n = start * np.geomspace(_LEAST, 1, _GRID)
    d = flops / (per * n) - served / 3
    held, fits = dict[str, float](), d > 0
    if np.isfinite(share):
        law, values, held = _REPEATED, laws.repeated(law, values), {"unique_tokens": share * fresh}
        fits = d > share * fresh
    if not fits.any():
        problem = f"doesn't pay for serving {served:.3g} tokens, not even of a small model"
        raise UserError("target.flops", problem, "give more FLOPs, or a smaller target.served")
    loss = law.predict(values, parameters=n[fits], tokens=d[fits], **held)
    return float(n[fits][loss.argmin()] / start)


def _trained(study: "StudyFit", flops: float, level: float) -> Optimum:
    """Return N* and D* if all of `flops` is spent on training."""
    per = study.points.per_token
    law = laws.compute_optimal(study.form, study.fit.vector, flops, per)
    parts = {"law": float(law[0][0])}
    if isinstance(iso := study.isoflop, IsoFlop):
        parts["parabolas"] = float(iso.parameters(flops))
    if study.forecaster is not None:
        parts["shape"] = float(np.exp(study.forecaster.shape.optimum(np.log(flops))))
    if len(parts) == 1:
        return _of_law(study, flops, level)
    logs = np.log(list(parts.values()))
    n = float(np.exp(logs.mean()))
    decades = max(0.0, float(np.log10(flops / spent(study.points).max())))
    deviation = np.sqrt(NEAR**2 + (PER_DECADE * decades**POWER) ** 2 + APART**2 * logs.var())
    half = float(np.exp(stdtrit(_FREEDOM, (1 + level) / 2) * deviation))
    d = flops / (per * n)
    return Optimum(n, d, ((n / half, n * half), (d / half, d * half)), parts)


def _of_law(study: "StudyFit", flops: float, level: float, **held: float | None) -> Optimum:
    """Return N* and D* of the law alone, with resampled intervals. held: what else it reads."""

    def best(values: Array) -> Array:
        each = laws.compute_optimal(study.form, values, flops, study.per_token, **held)
        return np.stack([x[..., 0] for x in each], axis=-1)

    n, d = map(float, best(study.fit.vector))
    ends = study.replicates.interval(level, best).T.tolist()
    return Optimum(n, d, (tuple(ends[0]), tuple(ends[1])), {"law": n})
