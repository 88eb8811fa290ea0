"""Choose a law: that with the lowest backtest error near the target's extrapolation factor.

    each law -> its backtests -> the error over runs with an extrapolation factor near the target's

Invariant: a law is judged only by runs that it was not fitted to. A note of the fit names the
chosen law, the errors of all candidates and the factors at which they were measured.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import LawName, StudyJob
from forescale.scaling.fitting.points import spent
from forescale.scaling.forecasting.calibrated import Backtest

AUTO = "auto"
# Laws of N and D.
CANDIDATES: tuple[LawName, ...] = ("chinchilla", "shared-exponent", "over-training", "kaplan")
_NEAR = 2.0  # a factor is near the target's if it is at most this many times larger or smaller
_FEWEST = 3  # with fewer runs near the target's factor, the runs of the largest factors count


def law_of(table: pd.DataFrame, job: StudyJob, where: str) -> StudyFit:
    """Return the fit of the law `job.form`; for `auto`, of the law with the lowest backtest error.
    Raises UserError if the runs determine no law."""
    if job.form != AUTO:
        return StudyFit(table, job, where)
    fits, why = dict[str, StudyFit](), list[UserError]()
    for name in CANDIDATES:
        try:
            fits[name] = StudyFit(table, replace(job, form=name), where)
        except UserError as e:
            why.append(e)
    if not fits:
        raise why[0]
    first, study = next(iter(fits.items()))
    factor = None
    if job.target.is_given:
        factor = max(1.0, run_of(study, job.target)[3] / float(spent(study.points).max()))
    judged = {name: error_near(m.backtests, factor) for name, m in fits.items() if m.backtests}
    if not judged:
        fits[first].notes.append(f"There are no backtests to choose a law by: {first} is taken.")
        return fits[first]
    best = min(judged, key=lambda name: judged[name][0])
    low, high = judged[best][1]
    errors = sorted(judged.items(), key=lambda item: item[1][0])
    text = ", ".join(f"{name} {error:.2%}" for name, (error, _) in errors)
    fits[best].notes.append(
        f"The chosen law is {best}, by the backtest errors at extrapolation factors of {low:.3g} "
        f"to {high:.3g}: {text}."
    )
    return fits[best]


def error_near(
    backtests: Sequence[Backtest], extrapolation_factor: float | None
) -> tuple[float, tuple[float, float]]:
    """Return the root mean square of log errors, and the least and greatest factor of its runs.

    The runs are those near `extrapolation_factor` or, if they are fewer than three, the half with
    the largest factors; all of them if it is None.
    """
    factors = np.concatenate([b.factors for b in backtests])
    errors = np.concatenate([b.errors for b in backtests])
    near = np.ones(len(factors), dtype=bool)
    if extrapolation_factor is not None:
        near = np.abs(np.log(factors / extrapolation_factor)) <= np.log(_NEAR)
        if near.sum() < _FEWEST:
            near = factors >= np.median(factors)
    ends = float(factors[near].min()), float(factors[near].max())
    return float(np.sqrt(np.square(errors[near]).mean())), ends
