"""The sizes of a study's next budget: around the optimum of the budgets before.

    a budget with a vertex      N* of its parabola counts
    before the first one        the pilot is a budget
    without a vertex            its best run counts, and it is said: so sizes move towards an
                                optimum that is beyond them, by up to plan.spread a budget

Invariant: the same records give the same sizes.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.isoflop import Refusal, Vertex, vertex

_SLOPE, _SLOPES = 0.5, (0.3, 0.7)  # exponent of N*(C): before two budgets give one; its limits


def optimum(table: pd.DataFrame, job: StudyJob) -> Callable[[float], float]:
    """Return N*(C), a power law through the vertices of the budgets' parabolas. Its exponent is
    fitted once there are two budgets. Without a valid parabola, the best run of the budget
    counts."""
    best = {
        budget: at.parameters if isinstance(at, Vertex) else lowest
        for budget, at, lowest in _vertices(table, job)
    }
    c, n = np.log(list(best)), np.log(list(best.values()))
    slope = _SLOPE
    if len(best) > 1:
        slope = float(np.clip(np.polyfit(c, n, 1)[0], *_SLOPES))
    level = float(np.mean(n - slope * c))
    return lambda flops: float(np.exp(level + slope * math.log(flops)))


def _vertices(
    table: pd.DataFrame, job: StudyJob
) -> Iterator[tuple[float, Vertex | Refusal, float]]:
    """Yield each budget, the vertex of its parabola or the refusal, and N of its best run."""
    runs = table[table["fitted"]]
    if runs.empty:  # before the first budget of the law: the pilot
        swept = table[table["role"].isin(("pilot", "rate"))]
        runs = table.loc[swept.groupby("cell_of")["loss"].idxmin()]
    for budget, rows in runs.groupby("budget"):
        n, d = (np.log(rows[c].to_numpy(dtype=float)) for c in (f"parameters_{job.size}", "tokens"))
        losses, spent = rows["loss"].to_numpy(), rows[f"flops_{job.cost}"].to_numpy()
        at = vertex(float(budget), n, d, losses, spent)
        yield float(budget), at, float(np.exp(n[np.argmin(losses)]))


def say_if_no_vertex(table: pd.DataFrame, job: StudyJob, log: Callable[[str], None]) -> None:
    """Log that the largest budget so far shows no optimum of N, and where the next sizes are."""
    *_, (budget, at, lowest) = _vertices(table, job)
    if isinstance(at, Refusal):
        log(
            f"Note: {budget:.3g} FLOPs show no optimum of N: {at.why}. The next sizes are around "
            f"its best run, N={lowest:,.0f}."
        )
