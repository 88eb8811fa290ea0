"""Backtests of metrics: what the two steps would have predicted of larger budgets, and how far off.

    origin k     budgets 1..k -> law and link -> the metric of each run of the next two budgets
    two steps    the loss by `study fit` of the origin's runs, put into their link
    line         a straight line in log C through the best runs of the last three budgets
    last value   the metric of the last budget's best run

The best run of a budget is that with the lowest loss. Of a loss, the line is one of its log.
Invariant: nothing beyond an origin is read. Errors are in the unit of the metric for shares, and
logs of predicted over observed for losses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from forescale.console import Progress, silent
from forescale.errors import UserError
from forescale.scaling.analysis.backtest import AHEAD, Coverage
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.task_fit import OUTCOME, Task, TaskFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.doubts.metric import FEWEST
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.records.records import budgets_of, points

TWO_STEPS, LINE, LAST = "two steps", "line", "last value"
METHODS = (TWO_STEPS, LINE, LAST)
BEST, OTHER = "best", "other"
_LINE = 3  # budgets that the line goes through
_RESAMPLED = 100  # refits at an origin


@dataclass(frozen=True)
class Ladder:
    """The finished runs of one table, by C: records with `outcome`. budgets: of each run, (n,)."""

    name: str
    runs: pd.DataFrame
    budgets: Array
    flops: Array


def ladder(table: pd.DataFrame, job: StudyJob, name: str) -> Ladder:
    """Return the runs of a table that have a finite loss and the metric. Raises UserError if their
    budgets are fewer than four."""
    table = table[table["fitted"]] if "fitted" in table else table
    table = table[(table["loss"] < np.inf) & table[OUTCOME].notna()].reset_index(drop=True)
    if table.empty:
        todo = "give runs that are evaluated on the task"
        raise UserError(name, "no run has a finite loss and the metric", todo)
    flops = spent(points(table, job.size, job.cost, name))
    found = Ladder(name, table, budgets_of(table, flops), flops)
    if (count := len(np.unique(found.budgets))) < FEWEST:
        problem = f"has {count} budgets with the metric, too few for a backtest"
        raise UserError(name, problem, f"give a table with {FEWEST} budgets or more")
    return found


def forecasts(one: Ladder, job: StudyJob, progress: Progress = silent) -> pd.DataFrame:
    """Return all forecasts, a row each.

    table, method; origin: its number of budgets; ahead: budgets beyond it; group: "best" or
    "other"; observed, predicted: the metric; error; inside_50, inside_90: None without intervals.
    Origins that determine no law or link, or whose data can't tell, have no row. Raises UserError,
    with the reason of the last origin, if none has one.
    """
    own = replace(job, bootstraps=_RESAMPLED, target=TargetPoint(), sensitivity=False, level=0.9)
    distinct, rows, why = np.unique(one.budgets), list[pd.DataFrame](), ""
    for k in range(FEWEST - 1, len(distinct)):
        made = _task(one, own, one.budgets <= distinct[k - 1])
        if isinstance(made, TaskFit):
            rows += _rows(one, made, distinct, k)
        else:
            why = made
        progress("backtest", k - FEWEST + 2, len(distinct) - FEWEST + 1, "fits")
    if not rows:
        problem = (
            f"at no origin do the runs determine a law and a link ({why[:1].lower()}{why[1:]})"
        )
        raise UserError(one.name, problem, "add budgets, or runs whose metric differs")
    return pd.concat(rows, ignore_index=True)


def forecasts_of(
    each: Sequence[Ladder], job: StudyJob, progress: Progress = silent
) -> tuple[pd.DataFrame, list[UserError]]:
    """Return the forecasts of all tables, and why the others have none. Raises UserError if no
    table has any."""
    found, refused = list[pd.DataFrame](), list[UserError]()
    for one in each:
        try:
            found.append(forecasts(one, job, progress))
        except UserError as e:
            refused.append(e)
    if len(each) == 1 and refused:
        raise refused[0]
    if not found:
        problem = f"none of {len(each)} tables can be judged; the first: {refused[0].problem}"
        raise UserError("input", problem, refused[0].todo)
    return pd.concat(found), refused


def _task(one: Ladder, job: StudyJob, known: Array) -> TaskFit | str:
    """Return the fit of the known runs, or why there is none."""
    runs = one.runs[known]
    try:
        law = law_of(runs, job, one.name)
        made = TaskFit(Task(OUTCOME, runs, law.table, one.name), job, law)
    except UserError as e:
        return e.problem
    return made.unseen.rstrip(".") if made.unseen else made


def _rows(one: Ladder, made: TaskFit, distinct: Array, k: int) -> Iterator[pd.DataFrame]:
    """Yield the forecasts of each method at an origin."""
    best = np.array([_best(one, budget) for budget in distinct])
    metric = np.asarray(made.shown(one.runs[OUTCOME].to_numpy(dtype=float)))
    rivals = _rivals(np.log(one.flops[best[:k]]), metric[best[:k]], made.job.metric == "loss")
    for ahead, budget in zip(AHEAD, distinct[k:], strict=False):
        later = np.flatnonzero(one.budgets == budget)
        base = {"table": one.name, "origin": k, "ahead": ahead, "observed": metric[later],
                "group": np.where(later == best[k + ahead - 1], BEST, OTHER)}  # fmt: skip
        curve = made.curve(_losses(one, made, later))
        inside = {
            f"inside_{level}": (low <= metric[later]) & (metric[later] <= high)
            for level, (low, high) in ((50, curve.inner), (90, curve.outer))
        }
        yield _with_error({**base, "method": TWO_STEPS, "predicted": curve.value, **inside}, made)
        for name, of in rivals.items():
            guess = of(np.log(one.flops[later]))
            yield _with_error({**base, "method": name, "predicted": guess}, made)


def _best(one: Ladder, budget: float) -> int:
    own = np.flatnonzero(one.budgets == budget)
    return int(own[one.runs["loss"].to_numpy()[own].argmin()])


def _losses(one: Ladder, made: TaskFit, which: Array) -> Any:
    """Return the predicted losses of some runs, of which only N, D and C are read."""
    job, law = made.job, made.law
    own = points(one.runs.iloc[which], job.size, job.cost, one.name)
    columns = {c: np.exp(own.log(c)) for c in law.form.columns}
    return law.predicted(columns, one.flops[which])


def _rivals(log_c: Array, metric: Array, is_loss: bool) -> dict[str, Any]:
    """Return the simple forecasts, each a function from log C to the metric."""
    y = np.log(metric) if is_loss else metric
    slope, level = np.polyfit(log_c[-_LINE:], y[-_LINE:], 1)

    def line(x: Array) -> Array:
        found = level + slope * x
        return np.exp(found) if is_loss else np.clip(found, 0, 1)

    return {LINE: line, LAST: lambda x: np.full(len(x), metric[-1])}


def _with_error(row: Mapping[str, Any], made: TaskFit) -> pd.DataFrame:
    table = pd.DataFrame(row)
    if made.job.metric == "loss":
        return table.assign(error=np.log(table["predicted"] / table["observed"]))
    return table.assign(error=table["predicted"] - table["observed"])


@dataclass(frozen=True)
class Scores:
    """The scores of a method at the best runs, so many budgets ahead. table: None for all together.

    count: forecasts; median, mean: absolute error; bias: mean error with sign; coverage: of "best"
    and "other" runs, empty without intervals; skill: by rival, 1 - mean error over the rival's.
    """

    table: str | None
    method: str
    ahead: int
    count: int
    median: float
    mean: float
    bias: float
    coverage: Mapping[str, Coverage]
    skill: Mapping[str, float]


def scores(rows: pd.DataFrame) -> list[Scores]:
    """Return the scores of all tables together, then of each apart."""
    parts = [(None, rows), *((str(name), own) for name, own in rows.groupby("table", sort=False))]
    return [
        _scores(name, method, ahead, own[own["ahead"] == ahead])
        for name, own in parts
        for ahead in AHEAD
        for method in METHODS
        if (own["ahead"] == ahead).any()
    ]


def _scores(name: str | None, method: str, ahead: int, rows: pd.DataFrame) -> Scores:
    best = rows[rows["group"] == BEST]
    means = best["error"].abs().groupby(best["method"]).mean()
    mine = rows[rows["method"] == method]
    errors = mine.loc[mine["group"] == BEST, "error"]
    return Scores(
        name, method, ahead, len(errors), float(errors.abs().median()), float(errors.abs().mean()),
        float(errors.mean()),
        {g: _coverage(each) for g in (BEST, OTHER)
         if method == TWO_STEPS and len(each := mine[mine["group"] == g])},
        {rival: float(1 - means[method] / means[rival]) if means[rival] else 0.0
         for rival in (LINE, LAST) if rival != method},
    )  # fmt: skip


def _coverage(rows: pd.DataFrame) -> Coverage:
    return Coverage(len(rows), *(float(rows[f"inside_{n}"].mean()) for n in (50, 90)))


def as_dict(found: Sequence[Scores]) -> dict[str, Any]:
    """Return the scores as plain values, for JSON."""
    return {"scores": [asdict(one) for one in found]}
