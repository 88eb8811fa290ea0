"""The judge of forecasts: what each method would have forecast at every origin of finished studies.

    origin     the first k budgets of a table, three or more; each method knows their runs alone
    forecasts  the lowest loss of the next budget and of the one after, and each of their runs
    methods    "level" (forecasting/forecaster.py); "law", as `study fit` fits and calibrates it;
               and rivals with intervals by their own earlier errors: "line", "L(C)" (rivals.py),
               "last minimum"
    scores     by method and budgets ahead, for every table and pooled over all

Invariant: no forecast, interval or calibration at an origin reads a loss beyond it. Errors are log
of predicted over observed loss, which is about the relative error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from forescale.console import Progress, silent
from forescale.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, near_best, spent
from forescale.scaling.forecasting.calibrated import (
    BELIEF,
    CalibratedLaw,
    Discrepancy,
    laws_of_origins,
)
from forescale.scaling.forecasting.forecaster import Forecaster, forecasters
from forescale.scaling.forecasting.predictor import FRONTIER, LAW, LEVEL, LINE, Predicted, rivals
from forescale.scaling.records.records import points

LAST = "last minimum"
METHODS = (LEVEL, LAW, LINE, FRONTIER, LAST)
RIVALS = (LINE, FRONTIER, LAST)
GROUPS = MINIMA, NEAR, OTHER = "minima", "near", "other"
INNER, OUTER = 0.5, 0.9  # levels of the intervals
AHEAD = (1, 2)  # budgets between an origin and what it forecasts
JUDGED = ("chinchilla", "shared-exponent", "over-training", "kaplan", "frontier")
_LEAST = 3  # budgets of an origin
_NEAR = 0.01  # a run is near the optimum if its loss is at most this much above its budget's lowest
_RESAMPLED = 100  # refits of a law at an origin


@dataclass(frozen=True)
class Finished:
    """The runs of a finished study. budgets: the nominal budget of each run, (n,)."""

    name: str
    points: Points
    budgets: Array


def finished(table: pd.DataFrame, job: StudyJob, name: str) -> Finished:
    """Return the runs of a table that have a finite loss. Raises UserError if it has no column of
    budgets, if they are fewer than four, or if N, D or C is missing."""
    table = table[table["fitted"]] if "fitted" in table else table
    table = table[table["loss"] < np.inf]
    if "budget" not in table:
        todo = "name the column of each run's compute budget, such as columns={budget: C}"
        raise UserError(name, "has no column 'budget'", todo)
    if (count := table["budget"].nunique()) <= _LEAST:
        problem = f"has {count} budgets with a finite loss, too few for a backtest"
        raise UserError(name, problem, f"give a table with {_LEAST + 1} budgets or more")
    made = points(table, job.size, job.cost, name)
    for column in ("parameters", "tokens"):
        made.log(column)  # raises UserError if it is missing
    return Finished(name, made, table["budget"].to_numpy())


class Method(Protocol):
    """A method that knows the runs of an origin."""

    def minimum(self, budget: float) -> Predicted:
        """Return the forecast of the lowest loss of a budget, (1,)."""

    def of_runs(self, later: Points, budget: float) -> Predicted | None:
        """Return the forecasts of a budget's runs, (m,), or None; it reads no loss of `later`."""


@dataclass(frozen=True)
class _Level:
    made: Forecaster

    def minimum(self, budget: float) -> Predicted:
        return self.made.minimum(budget)

    def of_runs(self, later: Points, budget: float) -> Predicted:
        n, d = np.exp(later.log("parameters")), np.exp(later.log("tokens"))
        return self.made.of_runs(n, d, budget)


@dataclass(frozen=True)
class _Law:
    made: CalibratedLaw

    def minimum(self, budget: float) -> Predicted:
        law, flops = self.made.fit, np.array([budget])
        if law.form.columns == ("flops",):
            return self.made.predicted({"flops": flops}, flops)
        p, per = law.points, 6.0
        if p.flops is not None:
            per = float(np.exp(np.mean(p.log("flops") - p.log("parameters") - p.log("tokens"))))
        n, d = laws.compute_optimal(law.form, law.vector, flops, per)
        return self.made.predicted({"parameters": n, "tokens": d}, flops)

    def of_runs(self, later: Points, budget: float) -> Predicted:
        columns = {c: np.exp(later.log(c)) for c in self.made.fit.form.columns}
        return self.made.predicted(columns, spent(later))


@dataclass(frozen=True)
class _Rival:
    """loss: from a budget to its lowest loss; last: the last known budget; doubt: what the errors
    of the same rival at earlier origins show."""

    loss: Callable[[float], float]
    last: float
    doubt: Discrepancy

    def minimum(self, budget: float) -> Predicted:
        deviation = self.doubt.per_decade * np.log10([budget / self.last])
        return Predicted(np.log([self.loss(budget)]), deviation, BELIEF + self.doubt.origins)

    def of_runs(self, later: Points, budget: float) -> None:
        return None


def _levels(one: Finished, made: Iterable[Forecaster] | None) -> Iterator[tuple[int, Method]]:
    if made is None:
        known = one.budgets < one.budgets.max()  # the largest budget is none that an origin knows
        made = forecasters(one.points.take(known), one.budgets[known])
    for k, found in enumerate(made, start=2):
        if k >= _LEAST:
            yield k, _Level(found)


def _laws(one: Finished, job: StudyJob) -> Iterator[tuple[int, Method]]:
    kept = near_best(one.points.loss, one.budgets, job.near)
    goal = Objective.of(job.delta, job.residual)
    runs, budgets = one.points.take(kept), one.budgets[kept]
    for k, law in laws_of_origins(laws.FORMS[job.form], runs, budgets, goal, _RESAMPLED):
        yield k, _Law(law)


def _rivals(one: Finished) -> Iterator[tuple[int, str, Method]]:
    distinct = np.unique(one.budgets)
    lowest = np.array([one.points.loss[one.budgets == c].min() for c in distinct])
    seen: dict[str, list[tuple[int, Callable[[float], float]]]] = {name: [] for name in RIVALS}
    for k in range(_LEAST - 1, len(distinct)):
        found = rivals(distinct[:k], lowest[:k]) | {LAST: _constant(float(lowest[k - 1]))}
        for name, loss in found.items():
            errors = [
                abs(np.log(old(distinct[j]) / lowest[j])) / np.log10(distinct[j] / distinct[i - 1])
                for i, old in seen[name]
                for j in range(i, min(i + len(AHEAD), k))
            ]
            seen[name].append((k, loss))
            if k >= _LEAST:
                yield k, name, _Rival(loss, distinct[k - 1], Discrepancy().after(errors))


def _constant(loss: float) -> Callable[[float], float]:
    return lambda budget: loss


def _methods(
    one: Finished, job: StudyJob, chosen: Sequence[str], made: Iterable[Forecaster] | None
) -> Iterator[tuple[int, str, Method]]:
    """Yield the number of known budgets, the name and the method of every origin."""
    if LEVEL in chosen:
        yield from ((k, LEVEL, method) for k, method in _levels(one, made))
    yield from (found for found in _rivals(one) if found[1] in chosen)
    if LAW in chosen:
        yield from ((k, LAW, method) for k, method in _laws(one, job))


def forecasts(
    studies: Sequence[Finished],
    job: StudyJob,
    chosen: Sequence[str] = METHODS,
    progress: Progress = silent,
    made: Iterable[Forecaster] | None = None,
) -> pd.DataFrame:
    """Return all forecasts, a row each.

    table, method; origin: its number of budgets; ahead: budgets beyond it; beyond: the budget over
    the last known one; group: "minima", or of a run "near" or "other"; observed: the loss; error:
    log of predicted over observed loss; inner, outer: half of the width of the intervals in log
    loss. chosen: the methods; made: the forecasters of the origins of a single study, if they are
    there. Raises UserError for a law that has no forecast of a budget's minimum.
    """
    if job.form not in JUDGED:
        todo = f"give one of {', '.join(JUDGED)}"
        raise UserError("form", f"{job.form} can't be judged", todo)
    rows = list[pd.DataFrame]()
    total = sum(len(np.unique(one.budgets)) - _LEAST for one in studies) * len(chosen)
    done = 0
    for one in studies:
        for k, name, method in _methods(one, job, chosen, made):
            rows += _rows(one, k, name, method)
            done += 1
            progress("backtest", done, total, "fits")
    if done < total:  # a method that needs more runs has no fit at some origins
        progress("backtest", total, total, "fits")
    return pd.concat(rows, ignore_index=True)


def _rows(one: Finished, k: int, name: str, method: Method) -> Iterator[pd.DataFrame]:
    """Yield the forecasts of a method at an origin."""
    distinct = np.unique(one.budgets)
    for ahead, budget in zip(AHEAD, distinct[k:].tolist(), strict=False):
        later = one.points.take(one.budgets == budget)
        beyond = budget / float(distinct[k - 1])
        own = {"table": one.name, "method": name, "origin": k, "ahead": ahead, "beyond": beyond}
        y, lowest = later.log("loss"), float(np.log(later.loss.min()))
        least = method.minimum(budget)
        yield pd.DataFrame({**own, "group": MINIMA, **_against(least, np.array([lowest]))})
        if (each := method.of_runs(later, budget)) is not None:
            group = np.where(y - lowest <= np.log1p(_NEAR), NEAR, OTHER)
            yield pd.DataFrame({**own, "group": group, **_against(each, y)})


def _against(found: Predicted, observed: Array) -> dict[str, Array]:
    error = np.atleast_1d(found.log_loss - observed)
    half = {"inner": found.half(INNER), "outer": found.half(OUTER)}
    return {"observed": np.exp(observed), "error": error, **half}


@dataclass(frozen=True)
class Coverage:
    """The shares of observed losses inside the 50 and the 90 % interval, of a number of them."""

    count: int
    inner: float
    outer: float


@dataclass(frozen=True)
class Scores:
    """The scores of a method, so many budgets ahead. table: None for all tables together.

    count: forecasts of a minimum; median, bias: median absolute and mean signed error of them;
    bias_error: standard error of the bias, None for one table: those of a table err alike, so it is
    of tables as wholes (clusters: Cameron and Miller 2015); interval_score: of their 90 % intervals
    in log loss, lower is better (Gneiting and Raftery 2007, eq. 43), None without intervals;
    coverage: by group; skill: by rival, 1 - mean absolute error over the rival's, at the origins
    that both forecast.
    """

    table: str | None
    method: str
    ahead: int
    count: int
    median: float
    bias: float
    bias_error: float | None
    interval_score: float | None
    coverage: Mapping[str, Coverage]
    skill: Mapping[str, float]


def scores(rows: pd.DataFrame) -> list[Scores]:
    """Return the scores of all tables together, then of each apart."""
    parts = [(None, rows), *((name, own) for name, own in rows.groupby("table", sort=False))]
    return [
        _scores(None if name is None else str(name), method, ahead, own[own["ahead"] == ahead])
        for name, own in parts
        for ahead in AHEAD
        for method in METHODS
        if ((own["ahead"] == ahead) & (own["method"] == method)).any()
    ]


def _scores(name: str | None, method: str, ahead: int, rows: pd.DataFrame) -> Scores:
    minima = rows[rows["group"] == MINIMA]
    errors = minima.pivot(index=["table", "origin"], columns="method", values="error")
    mine = rows[rows["method"] == method]
    own = mine[mine["group"] == MINIMA]
    miss = np.maximum(own["error"].abs() - own["outer"], 0)
    mark = float((2 * own["outer"] + 2 / (1 - OUTER) * miss).mean())
    return Scores(
        name,
        method,
        ahead,
        len(own),
        float(own["error"].abs().median()),
        float(own["error"].mean()),
        _error_of_mean(own["error"], own["table"]),
        None if np.isnan(mark) else mark,
        {} if np.isnan(mark) else {
            g: _coverage(each) for g in GROUPS if len(each := mine[mine["group"] == g])
        },
        {rival: _skill(errors[[method, rival]].dropna().abs().mean().to_numpy())
         for rival in RIVALS if rival in errors and rival != method},
    )  # fmt: skip


def _error_of_mean(errors: pd.Series, tables: pd.Series) -> float | None:
    sums = (errors - errors.mean()).groupby(tables).sum()
    T = len(sums)
    return float(np.sqrt(T / (T - 1) * (sums**2).sum()) / len(errors)) if T > 1 else None


def _coverage(rows: pd.DataFrame) -> Coverage:
    inside = (float((rows["error"].abs() <= rows[at]).mean()) for at in ("inner", "outer"))
    return Coverage(len(rows), *inside)


def _skill(means: Array) -> float:
    ours, theirs = means
    return float(1 - ours / theirs) if theirs else 0.0


def earlier(
    table: pd.DataFrame, job: StudyJob, method: str, made: Sequence[Forecaster] = ()
) -> pd.DataFrame | None:
    """Return the forecasts of one method and of the rivals at the origins of one table; None if its
    budgets are too few, or if its law can't be judged.

    made: the forecasters of its budgets. They are made anew if they know only some budgets.
    """
    if job.form not in JUDGED:
        return None
    try:
        one = finished(table, job, "runs")
    except UserError:
        return None
    all_known = len(made) == len(np.unique(one.budgets)) - 1  # the first knows two budgets
    return forecasts([one], job, (method, *RIVALS), made=made[:-1] if all_known else None)


def as_dict(found: Sequence[Scores]) -> dict[str, Any]:
    """Return the scores as plain values, for JSON; a share of no runs is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return None if isinstance(value, float) and np.isnan(value) else value

    return {"scores": [plain(asdict(one)) for one in found]}
