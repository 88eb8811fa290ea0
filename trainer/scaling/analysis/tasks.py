"""The accuracy of tasks, predicted in two steps: N and D to a loss, the loss to the accuracy.

    step 1    a law of the task's own loss, or of the table's, as `study fit` makes it
    step 2    a link from that loss to the accuracy (fitting/links.py), fitted to observed losses
    chained   the loss predicted for the target, put into the link

Invariant: accuracies are shares from 0 to 1; errors are 1 - accuracy, and results are given as the
job's metric. The interval of a chained prediction has what is known of both steps: the interval of
the loss, the resampled fits of the link, and the scatter of runs around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from forescale.errors import UserError
from forescale.scaling.analysis.answer import Prediction, StudyFit
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.links import GOAL, LINKS, NO_LOSS, Outcomes
from forescale.scaling.fitting.points import Array

ACCURACY = "accuracy"  # the column of an outcome
_FREEDOM = 3  # of Student's t, by which the interval of a predicted loss is made


@dataclass(frozen=True)
class Task:
    """What is known of one task.

    runs: records for step 1, with the loss that is predicted as `loss`; outcomes: rows for step 2,
    with `loss` and `accuracy`, each row a run or one of its checkpoints; where: names them in
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


class TaskFit:
    """The link of one task and, with a target, its chained prediction.

    Raises UserError if its runs don't determine the link, or the law of its loss.
    """

    def __init__(self, task: Task, job: StudyJob):
        self.task, self.job, self.notes = task, job, list[str]()
        own = task.outcomes
        self.outcomes = own[(own["loss"] < np.inf) & own[ACCURACY].notna()].reset_index(drop=True)
        if left := len(own) - len(self.outcomes):
            self.notes.append(
                f"{left} rows without a finite loss or without the metric are left out."
            )
        if self.outcomes.empty:
            todo = "give runs that are evaluated on the task"
            raise UserError(task.where, f"no row has a loss and {task.name}", todo)
        loss, accuracy = (self.outcomes[c].to_numpy(dtype=float) for c in ("loss", ACCURACY))
        self.ideal = job.link == "sigmoid"
        if self.ideal:  # as its source: no loss is an accuracy of 1
            loss, accuracy = np.append(loss, NO_LOSS), np.append(accuracy, 1.0)
        self.points = Outcomes(accuracy, task_loss=loss, where=f"{task.where}, {task.name}")
        self.link: Fit = fit(LINKS[job.link], self.points, GOAL)
        certificate = self.link.certificate
        self.notes += [f"The link is not certified: {p}." for p in certificate.problems]
        self.notes += [
            f"{edge} of its range: these runs don't determine it." for edge in certificate.edges
        ]

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

    @cached_property
    def residuals(self) -> Array:
        """Return observed minus fitted accuracy of each row, (n,)."""
        own = self.outcomes
        fitted = self.link.predict(task_loss=own["loss"].to_numpy(dtype=float))
        found: Array = own[ACCURACY].to_numpy(dtype=float) - fitted
        return found

    def metric(self, accuracy: Array | float) -> Any:
        """Return an accuracy as the job's metric."""
        return 1 - accuracy if self.job.metric == "error" else accuracy

    @cached_property
    def law(self) -> StudyFit:
        """Return the law of the task's loss."""
        return law_of(self.task.runs, self.job, f"{self.task.where}, the loss of {self.task.name}")

    @cached_property
    def chained(self) -> Chained | None:
        """Return the prediction for the target, or None without one."""
        if not self.job.target.is_given:
            return None
        found = self.law.predict()
        assert found is not None  # there is a target
        # The link is resampled apart: its scatter at a given loss says nothing of the loss's own.
        rng = np.random.default_rng(self.job.seed + 1)
        values = self.replicates.values
        losses = _drawn_losses(found, self.job.level, len(values), rng)
        accuracy = self.link.form.predict(values, task_loss=losses[:, None])[:, 0]
        size = self.link.form.size
        scale = np.sqrt(len(self.residuals) / max(1, len(self.residuals) - size))
        accuracy += scale * rng.choice(self.residuals - self.residuals.mean(), len(accuracy))
        drawn = np.clip(self.metric(accuracy), 0, 1)
        value = float(self.metric(self.link.predict(task_loss=found.loss)[0]))
        inner, outer = (_ends(drawn, level) for level in (0.5, self.job.level))
        return Chained(found, value, inner, outer)

    @property
    def doubts(self) -> list[str]:
        """Return what makes the numbers doubtful, as sentences."""
        found = list(self.notes)
        if (made := self.chained) is not None:
            least = float(self.outcomes["loss"].min())
            if made.loss.loss < least:
                found.append(
                    f"The link is extrapolated: it has seen no loss below {least:.4g}, and "
                    f"{made.loss.loss:.4g} is predicted."
                )
            found += [*self.law.doubts, *self.law.notes]
        return found


def _groups(outcomes: pd.DataFrame) -> Array:
    """Return the group that each row is drawn with: its trunk, or its run, or itself, (n,)."""
    for column in ("trunk", "name"):
        if column in outcomes and 1 < outcomes[column].nunique() < len(outcomes):
            found: Array = outcomes[column].astype(str).factorize()[0]
            return found
    return np.arange(len(outcomes))


def _drawn_losses(p: Prediction, level: float, count: int, rng: np.random.Generator) -> Array:
    """Return losses of the target, (count,), whose interval at `level` is the prediction's."""
    low, high = np.log(np.array(p.outer) / p.loss)
    z = rng.standard_t(_FREEDOM, count) / stdtrit(_FREEDOM, (1 + level) / 2)
    found: Array = p.loss * np.exp(np.where(z < 0, -z * low, z * high))
    return found


def _ends(drawn: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fit_tasks(tasks: Sequence[Task], job: StudyJob) -> list[TaskFit]:
    """Return the fit of each task, its prediction made. Raises UserError as TaskFit."""
    made = [TaskFit(task, job) for task in tasks]
    for one in made:
        _ = one.chained  # a target that can't be predicted is refused before anything is printed
    return made


def as_dict(made: Sequence[TaskFit]) -> dict[str, Any]:
    """Return all results as plain values, for JSON."""
    found = []
    for one in made:
        low, high = one.replicates.interval(one.job.level)
        p = one.chained
        found.append({
            "task": one.task.name, "rows": len(one.outcomes),
            "values": one.link.values, "errors": one.replicates.errors,
            "interval": {s: [float(low[i]), float(high[i])]
                         for i, s in enumerate(one.link.form.symbols)},
            "certified": one.link.certificate.holds, "scatter": float(one.residuals.std()),
            "prediction": None if p is None else {
                "loss": p.loss.loss, "loss_interval": list(p.loss.outer), "value": p.value,
                "interval_50": list(p.inner), "interval": list(p.outer),
                "extrapolation_factor": p.loss.extrapolation_factor,
            },
            "law": None if p is None else one.law.fit.values,
            "notes": one.doubts,
        })  # fmt: skip
    job = made[0].job
    return {
        "link": job.link, "source": LINKS[job.link].source, "metric": job.metric,
        "level": job.level, "tasks": found,
    }  # fmt: skip
