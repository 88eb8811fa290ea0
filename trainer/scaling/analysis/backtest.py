"""Backtests: what each method would have predicted at every origin of finished runs.

    origin   the first k budgets of a table, three or more; each method knows their runs alone
    methods  of a loss: "combined" (forecasting/forecaster.py); "law", as `study fit` fits and
             calibrates it; "line", "L(C)" and "last minimum" (forecasting/predictor.py). Of a
             task's metric: those of task_fit.py
    rows     of every later budget: the lowest loss, and the loss of each run; or the metric of
             each run
    scores   by method and distance (predictor.BANDS), pooled over all tables, over those of a kind,
             and for every table

Invariant: no prediction, interval or calibration at an origin reads anything beyond it. Errors are
log of predicted over observed loss, which is about the relative error; of a metric that is a share
they are differences.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, near_best, spent
from forescale.scaling.forecasting.calibrated import laws_of_origins
from forescale.scaling.forecasting.forecaster import Forecaster, forecasters
from forescale.scaling.forecasting.predictor import (
    BANDS,
    COMBINED,
    FRONTIER,
    LAST,
    LAW,
    LEAST,
    LINE,
    Predictor,
    band_of,
    simple_predictors,
)
from forescale.scaling.records.records import OUTCOME, budgets_of, points

RIVALS = (LINE, FRONTIER, LAST)
METHODS = (COMBINED, LAW, *RIVALS)
GROUPS = MINIMA, NEAR, OTHER = "minima", "near", "other"
BEST = "best"  # of a metric, in place of the minima: the run with the lowest loss of its budget
LAWS = ("chinchilla", "shared-exponent", "over-training", "kaplan", "frontier")  # with a backtest
RESAMPLED = 100  # refits of a law at an origin
EVEN, UNEVEN = "even minima", "uneven minima"  # kinds of tables
_UNEVEN = 0.006  # the deviation of log minima from a parabola, from where they are uneven
_DRAWS = 2000  # resampled families of tables
_NEAR = 0.01  # a run is near the optimum if its loss is at most this much above its budget's lowest

Origin = tuple[int, str, Predictor]  # number of known budgets, name of the method, the method


@dataclass(frozen=True)
class Finished:
    """The finished runs of one table.

    runs: their records; budgets: the nominal budget of each, (n,); metric: of a task, (n,), if it
    is the metric that is predicted; None: their loss is.
    """

    name: str
    runs: pd.DataFrame
    points: Points
    budgets: Array
    metric: Array | None = None

    @property
    def kind(self) -> str:
        """Return whether the lowest losses of its budgets are even: near a parabola in log C, as
        those of studies with tuned rates and little noise are. Of few budgets they are."""
        distinct = np.unique(self.budgets)
        if len(distinct) < 5:
            return EVEN
        x = np.log(distinct) - np.log(distinct).mean()
        y = np.log([self.points.loss[self.budgets == c].min() for c in distinct])
        rest = y - np.polyval(np.polyfit(x, y, 2), x)
        return UNEVEN if np.sqrt((rest**2).sum() / (len(x) - 3)) > _UNEVEN else EVEN

    @property
    def family(self) -> str:
        """Return the name up to its first _ or -: tables of one origin share runs or code, and err
        alike."""
        return re.split("[_-]", self.name, maxsplit=1)[0]

    def observed(self, at: Array) -> tuple[Array, Array]:
        """Return what was observed of the runs of a mask, and the group of each, (m,) each."""
        loss = self.points.loss[at]
        if self.metric is not None:
            return self.metric[at], np.where(np.arange(len(loss)) == loss.argmin(), BEST, OTHER)
        return loss, np.where(np.log(loss) - np.log(loss.min()) <= np.log1p(_NEAR), NEAR, OTHER)


def finished(table: pd.DataFrame, job: StudyJob, name: str, has_metric: bool = False) -> Finished:
    """Return the runs of a table that have a finite loss and, if asked for, the metric.

    Raises UserError if they have fewer than four budgets, if the budgets are not named (those of
    runs with a metric may be half decades of C), or if N, D or C is missing.
    """
    table = table[table["fitted"]] if "fitted" in table else table
    table = table[(table["loss"] < np.inf) & (table[OUTCOME].notna() if has_metric else True)]
    if has_metric and table.empty:
        todo = "give runs that are evaluated on the task"
        raise UserError(name, "no run has a finite loss and the metric", todo)
    if not has_metric and "budget" not in table:
        todo = "name the column of each run's compute budget, such as columns={budget: C}"
        raise UserError(name, "has no column 'budget'", todo)
    table, metric = table.reset_index(drop=True), None
    runs = points(table, job.size, job.cost, name)
    if has_metric:
        metric = table[OUTCOME].to_numpy(dtype=float)
        metric = 1 - metric if job.metric == "error" else metric
    else:
        runs.columns(("parameters", "tokens"))  # raises UserError if one is missing
    budgets = budgets_of(table, spent(runs))
    if (count := len(np.unique(budgets))) <= LEAST:
        problem = f"has {count} budgets with {'the metric' if has_metric else 'a finite loss'}"
        todo = f"give a table with {LEAST + 1} budgets or more"
        raise UserError(name, f"{problem}, too few for a backtest", todo)
    return Finished(name, table, runs, budgets, metric)


def forecasts(
    studies: Sequence[Finished],
    job: StudyJob,
    methods: Sequence[str] = METHODS,
    progress: Progress = silent,
    levels: Iterable[Forecaster] | None = None,
) -> pd.DataFrame:
    """Return all predictions of losses, a row each, as `rows_of` makes them.

    methods: their names; levels: the forecasters of the origins of a single study, if they are
    known. Raises UserError for a law that predicts no budget's minimum.
    """
    if job.form not in LAWS:
        todo = f"give one of {', '.join(LAWS)}"
        raise UserError("form", f"{job.form} can't be judged", todo)
    rows = list[pd.DataFrame]()
    total = sum(len(np.unique(one.budgets)) - LEAST for one in studies) * len(methods)
    done = 0
    for one in studies:
        for origin in _origins(one, job, methods, levels):
            rows += rows_of(one, origin)
            done += 1
            progress("backtest", done, total, "fits")
    if done < total:  # a method that needs more runs has no fit at some origins
        progress("backtest", total, total, "fits")
    return pd.concat(rows, ignore_index=True)


def _origins(
    one: Finished, job: StudyJob, methods: Sequence[str], levels: Iterable[Forecaster] | None
) -> Iterator[Origin]:
    if COMBINED in methods:
        if levels is None:
            known = one.budgets < one.budgets.max()  # no origin knows the largest budget
            levels = forecasters(one.points.take(known), one.budgets[known])
        yield from ((k, COMBINED, each) for k, each in enumerate(levels, start=2) if k >= LEAST)
    yield from (each for each in simple_predictors(one.points, one.budgets) if each[1] in methods)
    if LAW in methods:
        near = near_best(one.points.loss, one.budgets, job.near)
        form = laws.FORMS[job.form].suited(one.points.varied)
        goal = Objective.of(job.delta, job.residual)
        runs, budgets = one.points.take(near), one.budgets[near]
        for k, law in laws_of_origins(form, runs, budgets, goal, RESAMPLED):
            yield k, LAW, law


def rows_of(one: Finished, origin: Origin) -> Iterator[pd.DataFrame]:
    """Yield the predictions of a method at an origin, a row each.

    table, family, kind, method; origin: its number of budgets; beyond: the budget over the last
    known one; band: its place in BANDS; group: "minima", or of a run "near" or "other", of a metric
    "best" or "other"; observed: the loss or the metric; the other columns: see
    Distribution.against.
    """
    k, method, predictor = origin
    distinct = np.unique(one.budgets)
    for budget in distinct[k:].tolist():
        at = one.budgets == budget
        later, (observed, groups) = one.points.take(at), one.observed(at)
        beyond = budget / float(distinct[k - 1])
        keys = {"table": one.name, "family": one.family, "kind": one.kind, "method": method,
                "origin": k, "beyond": beyond, "band": band_of(beyond)}  # fmt: skip
        predicted = [
            (MINIMA, predictor.minimum(budget), later.loss.min(keepdims=True)),
            (groups, predictor.of_runs(later.columns(), spent(later), budget), observed),
        ]
        for group, distribution, y in predicted:
            if distribution is not None:
                errors = distribution.against(y)
                yield pd.DataFrame({**keys, "group": group, "observed": y, **errors})


@dataclass(frozen=True)
class Coverage:
    """The shares of observed values inside the 50 and the 90 % interval, of a number of them."""

    count: int
    inner: float
    outer: float


@dataclass(frozen=True)
class Scores:
    """The scores of a method at one distance. table: None for several tables together; kind: of
    these tables, None for all.

    band: place in BANDS; count: predictions of a minimum, or of the metric of the best run; median,
    bias: median absolute and mean signed error of them; bias_error: standard error of the bias,
    None for one family of tables: those of a family err alike, so it is of families as wholes
    (clusters: Cameron and Miller 2015); interval_score: mean of their 90 % intervals, None without
    intervals; coverage: by group; skill: by rival, 1 - mean absolute error over the rival's, at the
    origins that both predict; skill_interval: the 90 % interval of each, of resampled families;
    mean: mean absolute error, of a metric.
    """

    table: str | None
    kind: str | None
    method: str
    band: int
    count: int
    median: float
    bias: float
    bias_error: float | None
    interval_score: float | None
    coverage: Mapping[str, Coverage]
    skill: Mapping[str, float]
    skill_interval: Mapping[str, tuple[float, float]]
    mean: float | None = None


def scores(
    rows: pd.DataFrame, methods: Sequence[str] = METHODS, rivals: Sequence[str] = RIVALS
) -> list[Scores]:
    """Return the scores of all tables together, of those of each kind, then of each apart."""
    parts = list[tuple[str | None, str | None, pd.DataFrame]]([(None, None, rows)])
    if rows["kind"].nunique() > 1:
        parts += [(None, str(kind), part) for kind, part in rows.groupby("kind")]
    parts += [(str(name), None, part) for name, part in rows.groupby("table", sort=False)]
    return [
        _scores((name, kind, method, band), part[part["band"] == band], rivals)
        for name, kind, part in parts
        for band in range(len(BANDS) - 1)
        for method in methods
        if ((part["band"] == band) & (part["method"] == method)).any()
    ]


def _scores(
    keys: tuple[str | None, str | None, str, int], rows: pd.DataFrame, rivals: Sequence[str]
) -> Scores:
    method = keys[2]
    best = rows[rows["group"].isin((MINIMA, BEST))]
    index = ["family", "table", "origin", "beyond"]
    table = best.pivot(index=index, columns="method", values="error")
    best, of_method = best[best["method"] == method], rows[rows["method"] == method]
    errors, mark = best["error"], float(best["interval_score"].mean())
    sums = (errors - errors.mean()).groupby(best["family"]).sum()
    T, error = len(sums), None
    if T > 1:
        error = float(np.sqrt(T / (T - 1) * (sums**2).sum()) / len(errors))
    coverage = dict[str, Coverage]()
    if not np.isnan(mark):
        for group in (BEST, *GROUPS):
            if len(part := of_method[of_method["group"] == group]):
                shares = (float(part[f"inside_{share}"].mean()) for share in (50, 90))
                coverage[group] = Coverage(len(part), *shares)
    skill, ends = dict[str, float](), dict[str, tuple[float, float]]()
    for rival in rivals:
        if rival in table and rival != method:
            sizes = table[[method, rival]].dropna().abs().groupby("family").sum().to_numpy()
            skill[rival] = float(_skill(sizes.sum(axis=0)))
            if len(sizes) > 1:
                drawn = np.random.default_rng(0).integers(len(sizes), size=(_DRAWS, len(sizes)))
                low, high = np.percentile(_skill(sizes[drawn].sum(axis=1)), [5, 95])
                ends[rival] = float(low), float(high)
    return Scores(
        *keys, len(best), float(errors.abs().median()), float(errors.mean()), error,
        None if np.isnan(mark) else mark, coverage, skill, ends,
        float(errors.abs().mean()) if (best["group"] == BEST).any() else None,
    )  # fmt: skip


def _skill(sizes: Array) -> Array:
    """Return 1 - the first over the second of the last axis; 0 where the rival has no error."""
    one, rival = sizes[..., 0], sizes[..., 1]
    return 1 - np.divide(one, rival, out=np.ones_like(one), where=rival > 0)


def earlier(
    table: pd.DataFrame, job: StudyJob, method: str, levels: Sequence[Forecaster] = ()
) -> pd.DataFrame | None:
    """Return the predictions of one method and of the rivals at the origins of one table; None if
    its budgets are too few, or if its law has no backtest.

    levels: the forecasters of its budgets. They are made anew if they know only some budgets.
    """
    if job.form not in LAWS:
        return None
    try:
        one = finished(table, job, "runs")
    except UserError:
        return None
    all_known = len(levels) == len(np.unique(one.budgets)) - 1  # the first knows two budgets
    return forecasts([one], job, (method, *RIVALS), levels=levels[:-1] if all_known else None)


def as_dict(scores: Sequence[Scores]) -> dict[str, Any]:
    """Return the scores as plain values, for JSON; a share of no runs is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items() if (k, v) != ("mean", None)}
        return None if isinstance(value, float) and np.isnan(value) else value

    return {"scores": [plain(asdict(one)) for one in scores]}
