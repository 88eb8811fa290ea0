"""The metric of a task, predicted in two steps: N and D to a loss, the loss to the metric.

    step 1    the forecast of the task's own loss, or of the table's, as `study fit` makes it: by
              the combination beyond the budgets of a table that has them, else by the law
    step 2    a link from that loss to the metric (fitting/links.py), fitted to observed losses
    chained   the loss predicted for a run, put into the link
    backtest  these two steps at every origin, beside a straight line in log C through the best runs
              of the last three budgets, and beside the metric of the last budget's best run

Invariant: accuracies are shares from 0 to 1; errors are 1 - accuracy, and results are those of the
job's metric. The interval of a chained prediction has what is known of both steps, draw by draw: a
draw of the predicted loss, put into a resampled fit of the link, and the scatter of runs around it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.scaling.analysis import backtest
from forescale.scaling.analysis.backtest import RESAMPLED, Finished, Origin, Scores, rows_of
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.doubts.metric import others, unseen
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.links import (
    LEAST,
    LINKS,
    NO_LOSS,
    POWER,
    SIGMOID,
    TO_ONE,
    Outcomes,
    from_chance,
    goal_of,
)
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.forecasting.predictor import ERRORS, INNER, LINE, OUTER, Predicted
from forescale.scaling.forecasting.predictor import LEAST as LEAST_BUDGETS
from forescale.scaling.records.records import OUTCOME, budgets_of, points

TWO_STEPS, LAST_VALUE = "two steps", "last value"
METHODS = (TWO_STEPS, LINE, LAST_VALUE)
_LINE = 3  # budgets that the line goes through


@dataclass(frozen=True)
class Chained:
    """The prediction of a task for the target: the loss, and the metric with both intervals."""

    loss: Prediction
    value: float
    inner: tuple[float, float]
    outer: tuple[float, float]


@dataclass(frozen=True)
class PredictedMetric:
    """The predicted metric of m runs.

    value: (m,); inner, outer: the 50 % interval and that of the job's level, (2, m) each, None
    without intervals; is_log: True if errors are logs of ratios, as those of losses are.
    """

    value: Array
    inner: Array | None = None
    outer: Array | None = None
    is_log: bool = False

    def against(self, observed: Array) -> dict[str, Array]:
        error = np.log(self.value / observed) if self.is_log else self.value - observed
        inside, width, score = [np.full(len(error), np.nan)] * 2, error * np.nan, error * np.nan
        if self.inner is not None and self.outer is not None:
            inside = [((low <= observed) & (observed <= high)).astype(float)
                      for low, high in (self.inner, self.outer)]  # fmt: skip
            ends = np.stack((*self.outer, observed))
            low, high, y = np.log(np.maximum(ends, LEAST)) if self.is_log else ends
            miss = np.maximum(np.maximum(low - y, y - high), 0)
            width, score = high - low, high - low + 2 / (1 - OUTER) * miss
        return dict(zip(ERRORS, (self.value, error, *inside, width, score), strict=True))


@dataclass(frozen=True)
class SimpleMetric:
    """A simple method: the metric as a function of log C alone."""

    of: Callable[[Array], Array]
    is_log: bool

    def minimum(self, budget: float) -> None:
        """Return None: it predicts no loss."""

    def of_runs(self, columns: Mapping[str, Array], flops: Array, budget: float) -> PredictedMetric:
        return PredictedMetric(self.of(np.log(flops)), is_log=self.is_log)


def link_of(job: StudyJob) -> Form:
    """Return the link that a job asks for. Raises UserError if it is none of the job's metric."""
    is_loss = job.metric == "loss"
    name: str = job.link
    if name == "auto":
        name = POWER if is_loss else TO_ONE
    if (name == POWER) != is_loss:
        fitting = "power" if is_loss else f"{TO_ONE}, {SIGMOID} or exponential"
        raise UserError("link", f"{name} is no link to metric={job.metric}", f"write {fitting}")
    if job.chance is None:
        return LINKS[name]
    if name != TO_ONE:
        raise UserError("chance", f"the link {name} holds no floor", f"write link={TO_ONE}")
    return from_chance(job.chance)


class TaskFit:
    """The link of one task and, with a target, its chained prediction.

    name: the task's; law: that of its loss, whose table has the metric as `outcome`; where: names
    the runs in messages. Raises UserError if they don't determine the link.
    """

    def __init__(self, name: str, law: StudyFit, where: str):
        self.name, self.law, self.job, self.notes = name, law, law.job, list[str]()
        form, rows = link_of(self.job), law.table
        self.outcomes = rows[(rows["loss"] < np.inf) & rows[OUTCOME].notna()].reset_index(drop=True)
        if left := len(rows) - len(self.outcomes):
            self.notes.append(
                f"{left} rows without a finite loss or without the metric are left out."
            )
        if self.outcomes.empty:
            todo = "give runs that are evaluated on the task"
            raise UserError(where, f"no row has a loss and {name}", todo)
        self.where, where = where, f"{where}, {name}"
        self.loss, self.metric = (self.outcomes[c].to_numpy(dtype=float) for c in ("loss", OUTCOME))
        loss, metric = self.loss, np.maximum(self.metric, LEAST)
        self.ideal = form.name == SIGMOID
        if not self.ideal and np.ptp(self.metric) == 0:
            problem = f"the metric is {self.in_metric(self.metric[0]):.4g} in all "
            problem += f"{len(metric)} rows: the data can't tell how it changes with the loss"
            raise UserError(where, problem, "add runs whose metric differs")
        if self.ideal:  # as its source: no loss is an accuracy of 1
            loss, metric = np.append(loss, NO_LOSS), np.append(metric, 1.0)
        self.points = Outcomes(metric, task_loss=loss, where=where)
        self.link: Fit = fit(form, self.points, goal_of(form))
        certificate = self.link.certificate
        self.notes += [f"The link is not certified: {p}." for p in certificate.problems]
        self.notes += [
            f"{edge} of its range: these runs don't determine it." for edge in certificate.edges
        ]

    @cached_property
    def replicates(self) -> bootstrap.Replicates:
        """Return the resampled fits of the link; the ideal point is in each of them."""
        rows = self.outcomes
        groups: Array = np.arange(len(rows))
        for column in ("name", "trunk"):  # rows are drawn with their trunk, or with their run
            if column in rows and 1 < rows[column].nunique() < len(rows):
                groups = rows[column].astype(str).factorize()[0]
        count = groups.max() + 1
        rng = np.random.default_rng(self.job.seed)
        weights = bootstrap.counts(rng, count, self.job.bootstraps)[:, groups]
        if self.ideal:
            weights = np.column_stack((weights, np.ones(len(weights))))
            groups = np.append(groups, count)
        return replace(bootstrap.replicates(self.link, weights=weights), groups=groups)

    @property
    def is_log(self) -> bool:
        """Return True if runs scatter around the link by a share of the metric, as losses do."""
        return self.link.form.name == POWER

    @cached_property
    def residuals(self) -> Array:
        """Return observed minus fitted metric of each row, (n,); of a loss, of its log."""
        fitted = self.link.predict(task_loss=self.loss)
        if self.is_log:
            return np.log(self.metric) - np.log(fitted)
        return self.metric - fitted

    def in_metric(self, outcome: Array | float) -> Any:
        """Return an outcome, as links read it, as the job's metric."""
        return 1 - outcome if self.job.metric == "error" else outcome

    @cached_property
    def unseen(self) -> str | None:
        """Return why no metric is predicted: the data can't tell; None if it can."""
        y = np.log(self.metric) if self.is_log else self.metric
        return unseen(self.loss, y, y - self.residuals, self.link.form.size)

    @cached_property
    def chained(self) -> Chained | None:
        """Return the prediction for the target; None without one, or if the data can't tell."""
        if not self.job.target.is_given:
            return None
        loss = self.law.predict()
        assert loss is not None  # there is a target
        if self.unseen:
            return None
        columns, _, _, c = run_of(self.law, self.job.target)
        metric = self.of_runs({k: np.array([v]) for k, v in columns.items()}, np.array([c]))
        assert metric.inner is not None  # both are None, or neither
        assert metric.outer is not None
        inner, outer = (tuple(ends[:, 0].tolist()) for ends in (metric.inner, metric.outer))
        return Chained(loss, float(metric.value[0]), inner, outer)

    def minimum(self, budget: float) -> None:
        """Return None: a metric is predicted of runs alone; see Predictor."""

    def of_runs(
        self, columns: Mapping[str, Array], flops: Array, budget: float = np.nan
    ) -> PredictedMetric:
        """Return the metric of runs by both steps; see forecasting/predictor.py, Predictor."""
        read = {c: columns[c] for c in self.law.form.columns}
        return self.curve(self.law.predicted(read, flops))

    def curve(self, loss: Predicted) -> PredictedMetric:
        """Return the metric of runs whose loss is predicted.

        A draw is one of how far all losses are off together, one fit of the link, and one run's
        scatter. The link is resampled apart from the law: its scatter at a given loss says nothing
        of the loss's own.
        """
        values = self.replicates.values
        rng = np.random.default_rng(self.job.seed + 1)
        off = stdtrit(loss.freedom, rng.uniform(size=(len(values), 1))) * loss.deviation
        losses = np.exp(loss.log_loss + off)  # (R, m)
        draws = self.link.form.predict(values, task_loss=losses)
        n, free = len(self.residuals), max(1, len(self.residuals) - self.link.form.size)
        # Student's t: a few residuals, drawn themselves, have no tails (85 to 91 % inside for 90).
        spread = self.residuals.std() * np.sqrt(n / free)
        scatter = spread * stdtrit(free, rng.uniform(size=(len(values), 1)))
        value = self.link.predict(task_loss=loss.loss)
        if self.is_log:
            draws = draws * np.exp(scatter)
        else:
            draws, value = np.clip(draws + scatter, 0, 1), np.clip(value, 0, 1)
        draws = self.in_metric(draws)
        inner, outer = (
            np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
            for level in (INNER, self.job.level)
        )
        return PredictedMetric(self.in_metric(value), inner, outer, self.is_log)

    @property
    def doubts(self) -> list[str]:
        """Return what makes the numbers doubtful, as sentences."""
        if self.unseen:
            return [self.unseen, *self.notes]
        job, rows = self.job, self.outcomes
        budgets = int(rows["budget"].nunique()) if "budget" in rows else None
        if budgets is None:
            with suppress(UserError):  # the rows don't say what they cost
                flops = spent(points(rows, job.size, job.cost, self.where))
                budgets = len(np.unique(budgets_of(rows, flops)))
        sentences = others(self.loss, self.metric, self.is_log, budgets, job.metric)
        least = float(self.loss.min())
        if self.chained is not None and self.chained.loss.loss < least:
            sentences.append(
                f"The link is extrapolated: it has seen no loss below {least:.4g}, and "
                f"{self.chained.loss.loss:.4g} is predicted."
            )
        return self.notes + sentences

    @cached_property
    def skill(self) -> list[Scores]:
        """Return the scores of a backtest on the runs of the law; empty with few budgets."""
        try:
            runs = backtest.finished(self.law.table, self.job, self.where, has_metric=True)
            return task_scores(forecasts(runs, self.job))
        except UserError:
            return []


def task_of(law: StudyFit, where: str) -> TaskFit | None:
    """Return the fit of the job's `task` from the runs of a law, or None if it names none. The
    records hold the metric as `outcome`. Raises UserError as TaskFit."""
    if law.job.task is None:
        return None
    return TaskFit(law.job.task, law, where)


def task_as_dict(one: TaskFit) -> dict[str, Any]:
    """Return the results of a metric beside its law as plain values, for JSON."""
    ends, p = one.replicates.interval(one.job.level).T.tolist(), one.chained
    return {
        "task": one.name, "rows": len(one.outcomes), "link": one.link.form.name,
        "metric": one.job.metric, "values": one.link.values, "errors": one.replicates.errors,
        "interval": dict(zip(one.link.form.symbols, ends, strict=True)),
        "certified": one.link.certificate.holds, "scatter": float(one.residuals.std()),
        "unseen": one.unseen,
        "prediction": None if p is None else {
            "loss": p.loss.loss, "loss_interval": list(p.loss.outer), "value": p.value,
            "interval_50": list(p.inner), "interval": list(p.outer),
            "extrapolation_factor": p.loss.extrapolation_factor,
        },
        "law": None if p is None else one.law.fit.values,
        "notes": one.doubts,
        "skill": [asdict(each) for each in one.skill],
    }  # fmt: skip


def forecasts(one: Finished, job: StudyJob, progress: Progress = silent) -> pd.DataFrame:
    """Return the predictions of each method at the origins of one table; see backtest.rows_of.

    Origins that determine no law or link, or whose data can't tell, have no row. Raises UserError,
    with the reason of the last origin, if none has one.
    """
    job = replace(job, bootstraps=RESAMPLED, target=TargetPoint(), sensitivity=False, level=OUTER)
    distinct, rows, why = np.unique(one.budgets), list[pd.DataFrame](), ""
    for k in range(LEAST_BUDGETS, len(distinct)):
        known = one.runs[one.budgets <= distinct[k - 1]]
        try:
            law = law_of(known, job, one.name)
            task = TaskFit(OUTCOME, law, one.name)
            why = (task.unseen or "").rstrip(".") or why
        except UserError as e:
            task, why = None, e.problem
        if task is not None and not task.unseen:
            rows += [row for origin in _origins(one, task, k) for row in rows_of(one, origin)]
        progress("backtest", k - LEAST_BUDGETS + 1, len(distinct) - LEAST_BUDGETS, "fits")
    if not rows:
        why = f"{why[:1].lower()}{why[1:]}"
        problem = f"at no origin do the runs determine a law and a link ({why})"
        raise UserError(one.name, problem, "add budgets, or runs whose metric differs")
    return pd.concat(rows, ignore_index=True)


def _origins(one: Finished, task: TaskFit, k: int) -> Iterator[Origin]:
    """Yield the methods that know the first k budgets."""
    assert one.metric is not None
    is_loss = task.job.metric == "loss"
    rows = [np.flatnonzero(one.budgets == budget) for budget in np.unique(one.budgets)[:k]]
    best = np.array([each[one.points.loss[each].argmin()] for each in rows])
    log_c, metric = np.log(spent(one.points)[best]), one.metric[best]
    y = np.log(metric) if is_loss else metric
    slope, level = np.polyfit(log_c[-_LINE:], y[-_LINE:], 1)

    def line(x: Array) -> Array:
        return np.exp(level + slope * x) if is_loss else np.clip(level + slope * x, 0, 1)

    yield k, TWO_STEPS, task
    yield k, LINE, SimpleMetric(line, is_loss)
    yield k, LAST_VALUE, SimpleMetric(lambda x: np.full(len(x), metric[-1]), is_loss)


def forecasts_of(
    tables: Sequence[Finished], job: StudyJob, progress: Progress = silent
) -> tuple[pd.DataFrame, list[UserError]]:
    """Return the predictions of all tables, and why the others have none. Raises UserError if no
    table has any."""
    rows, refused = list[pd.DataFrame](), list[UserError]()
    for one in tables:
        try:
            rows.append(forecasts(one, job, progress))
        except UserError as e:
            refused.append(e)
    if len(tables) == 1 and refused:
        raise refused[0]
    if not rows:
        problem = f"none of {len(tables)} tables can be judged; the first: {refused[0].problem}"
        raise UserError("input", problem, refused[0].todo)
    return pd.concat(rows), refused


def task_scores(rows: pd.DataFrame) -> list[Scores]:
    """Return the scores of predicted metrics; see backtest.scores."""
    return backtest.scores(rows, METHODS, (LINE, LAST_VALUE))
