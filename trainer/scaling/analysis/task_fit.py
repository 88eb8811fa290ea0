"""The metric of a task, predicted in two steps: N and D to a loss, the loss to the metric.

    step 1    a law of the task's own loss, or of the table's, as `study fit` makes it
    step 2    a link from that loss to the metric (links.py), fitted to observed losses
    chained   the loss predicted for a run, put into the link

Invariant: accuracies are shares from 0 to 1; errors are 1 - accuracy, and results are given as the
job's metric. The interval of a chained prediction has what is known of both steps, draw by draw: a
draw of the predicted loss, put into a resampled fit of the link, and the scatter of runs around it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from forescale.errors import UserError
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.config import StudyJob
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
from forescale.scaling.forecasting.predictor import Predicted
from forescale.scaling.records.records import budgets_of, points

OUTCOME = "outcome"  # the column of a metric, as links read it: an accuracy, or a loss
INNER = 0.5  # level of the inner interval


@dataclass(frozen=True)
class Task:
    """What is known of one task.

    runs: records for step 1, with the loss that is predicted as `loss`; outcomes: rows for step 2,
    with `loss` and `outcome`, each row a run or one of its checkpoints; where: names them in
    messages.
    """

    name: str
    runs: pd.DataFrame
    outcomes: pd.DataFrame
    where: str


@dataclass(frozen=True)
class Chained:
    """The prediction of a task for the target: the loss, and the metric with both intervals."""

    loss: Prediction
    value: float
    inner: tuple[float, float]
    outer: tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """The predicted metric of m runs: value, (m,); inner and outer interval, (2, m) each."""

    value: Array
    inner: Array
    outer: Array


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

    law: that of the task's loss, if it is fitted already. Raises UserError if its runs don't
    determine the link, or the law of its loss.
    """

    def __init__(self, task: Task, job: StudyJob, law: StudyFit | None = None):
        self.task, self.job, self.notes = task, job, list[str]()
        form = link_of(job)
        own = task.outcomes
        self.outcomes = own[(own["loss"] < np.inf) & own[OUTCOME].notna()].reset_index(drop=True)
        if left := len(own) - len(self.outcomes):
            self.notes.append(
                f"{left} rows without a finite loss or without the metric are left out."
            )
        if self.outcomes.empty:
            todo = "give runs that are evaluated on the task"
            raise UserError(task.where, f"no row has a loss and {task.name}", todo)
        self.loss, self.metric = (self.outcomes[c].to_numpy(dtype=float) for c in ("loss", OUTCOME))
        loss, metric = self.loss, np.maximum(self.metric, LEAST)
        self.ideal = form.name == SIGMOID
        if not self.ideal and np.ptp(self.metric) == 0:
            value, count = self.shown(self.metric[0]), len(self.metric)
            problem = f"the metric is {value:.4g} in all {count} rows: the data can't tell how it "
            problem += "changes with the loss"
            raise UserError(f"{task.where}, {task.name}", problem, "add runs whose metric differs")
        if self.ideal:  # as its source: no loss is an accuracy of 1
            loss, metric = np.append(loss, NO_LOSS), np.append(metric, 1.0)
        self.points = Outcomes(metric, task_loss=loss, where=f"{task.where}, {task.name}")
        self.link: Fit = fit(form, self.points, goal_of(form))
        if law is not None:
            self.law = law
        self._note_certificate()

    def _note_certificate(self) -> None:
        certificate = self.link.certificate
        self.notes += [f"The link is not certified: {p}." for p in certificate.problems]
        self.notes += [
            f"{edge} of its range: these runs don't determine it." for edge in certificate.edges
        ]

    @cached_property
    def law(self) -> StudyFit:
        """The law of the task's loss."""
        return law_of(self.task.runs, self.job, f"{self.task.where}, the loss of {self.task.name}")

    @cached_property
    def replicates(self) -> bootstrap.Replicates:
        """Return the resampled fits of the link; the ideal point is in each of them."""
        groups = _groups(self.outcomes)
        count = groups.max() + 1
        rng = np.random.default_rng(self.job.seed)
        weights = bootstrap.counts(rng, count, self.job.bootstraps)[:, groups]
        if self.ideal:
            weights = np.column_stack((weights, np.ones(len(weights))))
            groups = np.append(groups, count)
        return replace(bootstrap.replicates(self.link, weights=weights), groups=groups)

    @property
    def _is_log(self) -> bool:
        """True if runs scatter around the link by a share of the metric, as losses do."""
        return self.link.form.name == POWER

    @cached_property
    def residuals(self) -> Array:
        """Return observed minus fitted metric of each row, (n,); of a loss, of its log."""
        fitted = self.link.predict(task_loss=self.loss)
        if self._is_log:
            return np.log(self.metric) - np.log(fitted)
        return self.metric - fitted

    def shown(self, outcome: Array | float) -> Any:
        """Return an outcome, as links read it, as the job's metric."""
        return 1 - outcome if self.job.metric == "error" else outcome

    @cached_property
    def unseen(self) -> str | None:
        """Why no metric is predicted: the data can't tell; None if it can."""
        if self._is_log:
            y = np.log(self.metric)
            fitted = y - self.residuals
        else:
            y, fitted = self.metric, self.metric - self.residuals
        return unseen(self.loss, y, fitted, self.link.form.size)

    @cached_property
    def chained(self) -> Chained | None:
        """Return the prediction for the target; None without one, or if the data can't tell."""
        if not self.job.target.is_given:
            return None
        found = self.law.predict()
        assert found is not None  # there is a target
        if self.unseen:
            return None
        columns, _, _, c = run_of(self.law, self.job.target)
        one = self.law.predicted({k: np.array([v]) for k, v in columns.items()}, np.array([c]))
        made = self.curve(one)
        inner, outer = ((float(low[0]), float(high[0])) for low, high in (made.inner, made.outer))
        return Chained(found, float(made.value[0]), inner, outer)

    def curve(self, loss: Predicted) -> Curve:
        """Return the metric of runs whose loss is predicted.

        A draw is one of how far all losses are off together, one fit of the link, and one run's
        scatter. The link is resampled apart from the law: its scatter at a given loss says nothing
        of the loss's own.
        """
        values = self.replicates.values
        rng = np.random.default_rng(self.job.seed + 1)
        off = stdtrit(loss.freedom, rng.uniform(size=(len(values), 1))) * loss.deviation
        losses = np.exp(loss.log_loss + off)  # (R, m)
        drawn = self.link.form.predict(values, task_loss=losses)
        n, free = len(self.residuals), max(1, len(self.residuals) - self.link.form.size)
        # Student's t: a few residuals, drawn themselves, have no tails (85 to 91 % inside for 90).
        spread = self.residuals.std() * np.sqrt(n / free)
        scatter = spread * stdtrit(free, rng.uniform(size=(len(values), 1)))
        value = self.link.predict(task_loss=loss.loss)
        if self._is_log:
            drawn = drawn * np.exp(scatter)
        else:
            drawn, value = np.clip(drawn + scatter, 0, 1), np.clip(value, 0, 1)
        drawn = self.shown(drawn)
        inner, outer = (
            np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
            for level in (INNER, self.job.level)
        )
        return Curve(self.shown(value), inner, outer)

    @property
    def doubts(self) -> list[str]:
        """Return what makes the numbers doubtful, as sentences."""
        found = list(self.notes)
        if self.unseen:
            return [self.unseen, *found]
        budgets = self._budgets()
        found += others(self.loss, self.metric, self._is_log, budgets, self.job.metric)
        if (made := self.chained) is not None:
            least = float(self.loss.min())
            if made.loss.loss < least:
                found.append(
                    f"The link is extrapolated: it has seen no loss below {least:.4g}, and "
                    f"{made.loss.loss:.4g} is predicted."
                )
        return found

    def _budgets(self) -> int | None:
        """Return the number of different budgets; None if the rows don't say what they cost."""
        job, rows = self.job, self.outcomes
        if "budget" in rows:
            return rows["budget"].nunique()
        try:
            flops = spent(points(rows, job.size, job.cost, self.task.where))
        except UserError:
            return None
        return len(np.unique(budgets_of(rows, flops)))


def _groups(outcomes: pd.DataFrame) -> Array:
    """Return the group that each row is drawn with: its trunk, or its run, or itself, (n,)."""
    for column in ("trunk", "name"):
        if column in outcomes and 1 < outcomes[column].nunique() < len(outcomes):
            return outcomes[column].astype(str).factorize()[0]
    return np.arange(len(outcomes))
