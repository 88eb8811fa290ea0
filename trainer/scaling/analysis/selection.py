"""Which law to ask: the one that met dearer runs best, as far beyond its own as the request is.

    each form -> its roll-outs -> the error of those whose factor of compute is near the target's

Invariant: a form is judged by runs that it was not fitted to; what it was chosen by is a note of
the fit, with every rival's error and with the factors at which it was measured.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.config import LawName, StudyJob
from forescale.scaling.fitting.backtest import RollOut, spent

AUTO = "auto"
# Laws of N and D.
CANDIDATES: tuple[LawName, ...] = ("chinchilla", "shared-exponent", "over-training", "kaplan")
_NEAR = 2.0  # times the target's factor, or a part: as near as that counts as the same
_FEWEST = 3  # runs; with fewer so near, the farthest half of all


def law_of(table: pd.DataFrame, job: StudyJob, where: str) -> StudyFit:
    """The fit by job.form; by `auto`, of all laws of N and D the one with the least error. Raises
    UserError where no law can be told."""
    if job.form != AUTO:
        return StudyFit(table, job, where)
    made, why = dict[str, StudyFit](), list[UserError]()
    for name in CANDIDATES:
        try:
            made[name] = StudyFit(table, replace(job, form=name), where)
        except UserError as e:
            why.append(e)
    if not made:
        raise why[0]
    beyond = _beyond(next(iter(made.values())), job)
    judged = {name: judge(m.roll_outs, beyond) for name, m in made.items() if m.roll_outs}
    if not judged:
        first = next(iter(made))
        made[first].notes.append(f"No roll-outs to choose a law by: it is {first}.")
        return made[first]
    best = min(judged, key=lambda name: judged[name][0])
    low, high = judged[best][1]
    errors = sorted(judged.items(), key=lambda item: item[1][0])
    told = ", ".join(f"{name} {error:.2%}" for name, (error, _) in errors)
    made[best].notes.append(
        f"The law is {best}, by errors of roll-outs {low:.3g} to {high:.3g} times beyond: {told}."
    )
    return made[best]


def judge(found: Sequence[RollOut], beyond: float | None) -> tuple[float, tuple[float, float]]:
    """Root mean square of log errors over the runs met as far beyond as `beyond` (None: over all),
    or, where fewer than three were, over the farthest half; and the least and greatest factor."""
    factors = np.concatenate([r.factors for r in found])
    errors = np.concatenate([r.errors for r in found])
    kept = np.ones(len(factors), dtype=bool)
    if beyond is not None:
        kept = np.abs(np.log(factors / beyond)) <= np.log(_NEAR)
        if kept.sum() < _FEWEST:
            kept = factors >= np.median(factors)
    ends = float(factors[kept].min()), float(factors[kept].max())
    return float(np.sqrt(np.square(errors[kept]).mean())), ends


def _beyond(made: StudyFit, job: StudyJob) -> float | None:
    """How many times the greatest compute of the runs the target is."""
    if not job.target.is_given:
        return None
    flops = made.run_of(job.target)[3]
    return max(1.0, flops / float(spent(made.points).max()))
