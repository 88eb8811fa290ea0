"""The budgets of runs with a metric: those of the table, or half a decade of compute each.

Ladders of sizes and tokens have no two runs of one compute, so their budgets are made by rounding.
"""

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.scaling.analysis.tables import with_tokens
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.backtest import spent
from forescale.scaling.fitting.points import Array
from forescale.scaling.records.records import points

_A_DECADE = 2  # budgets a decade of C, as plan.step has


def budgets_of(table: pd.DataFrame, job: StudyJob, where: str) -> Array:
    """Return the budget of each run in FLOPs, (n,). Raises UserError if N, D and C are missing."""
    if "budget" in table:
        return table["budget"].to_numpy(dtype=float)
    c = flops_of(table, job, where)
    found: Array = 10 ** (np.round(np.log10(c) * _A_DECADE) / _A_DECADE)
    return found


def count_of(table: pd.DataFrame, job: StudyJob, where: str) -> int | None:
    """Return the number of different budgets, or None if the rows don't say what they cost."""
    try:
        return len(np.unique(budgets_of(table, job, where)))
    except UserError:
        return None


def flops_of(table: pd.DataFrame, job: StudyJob, where: str) -> Array:
    """Return C of each run, (n,). Raises UserError if N, D and C are missing."""
    return spent(points(with_tokens(table, job.size), job.size, job.cost, where))
