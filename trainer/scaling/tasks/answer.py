"""The answers about tasks: one metric beside a law, or several by `study tasks`; and for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from forescale.errors import UserError
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.analysis.task_fit import Task, TaskFit
from forescale.scaling.config import StudyJob
from forescale.scaling.tasks.judge import Scores, forecasts, ladder, scores


@dataclass(frozen=True)
class TaskAnswer:
    """The fit of one metric beside its law, with how far off such predictions would have been."""

    fit: TaskFit

    @cached_property
    def skill(self) -> list[Scores]:
        """The scores of a backtest on the fit's own runs; empty with few budgets."""
        law = self.fit.law
        try:
            return scores(forecasts(ladder(law.table, law.job, self.fit.task.where), law.job))
        except UserError:
            return []


def task_of(made: StudyFit, where: str) -> TaskAnswer | None:
    """Return the answer about the job's `task` from the runs of a law, or None if it names none.

    The records hold the metric as `outcome`. Raises UserError as TaskFit.
    """
    if made.job.task is None:
        return None
    task = Task(made.job.task, made.records, made.table, where)
    return TaskAnswer(TaskFit(task, made.job, made))


def fit_tasks(tasks: Sequence[Task], job: StudyJob) -> list[TaskFit]:
    """Return the fit of each task, its prediction made. Raises UserError as TaskFit."""
    made = [TaskFit(task, job) for task in tasks]
    for one in made:
        _ = one.chained  # a target that can't be predicted is refused before anything is printed
    return made


def as_dict(made: Sequence[TaskFit]) -> dict[str, Any]:
    """Return all results as plain values, for JSON."""
    job, form = made[0].job, made[0].link.form
    return {
        "link": form.name, "source": form.source, "metric": job.metric, "level": job.level,
        "tasks": [
            one_as_dict(one) | {"notes": [*one.doubts, *doubts_of_law(one)]} for one in made
        ],
    }  # fmt: skip


def doubts_of_law(one: TaskFit) -> list[str]:
    """Return what makes the law of a task's loss doubtful, if a prediction needs it."""
    return [*one.law.doubts, *one.law.notes] if one.chained is not None else []


def answer_as_dict(one: TaskAnswer) -> dict[str, Any]:
    """Return the answer about one metric as plain values."""
    return one_as_dict(one.fit) | {"skill": [asdict(each) for each in one.skill]}


def one_as_dict(one: TaskFit) -> dict[str, Any]:
    """Return the results of one task as plain values."""
    low, high = one.replicates.interval(one.job.level)
    p = one.chained
    return {
        "task": one.task.name, "rows": len(one.outcomes), "link": one.link.form.name,
        "metric": one.job.metric,
        "values": one.link.values, "errors": one.replicates.errors,
        "interval": {s: [float(low[i]), float(high[i])]
                     for i, s in enumerate(one.link.form.symbols)},
        "certified": one.link.certificate.holds, "scatter": float(one.residuals.std()),
        "unseen": one.unseen,
        "prediction": None if p is None else {
            "loss": p.loss.loss, "loss_interval": list(p.loss.outer), "value": p.value,
            "interval_50": list(p.inner), "interval": list(p.outer),
            "extrapolation_factor": p.loss.extrapolation_factor,
        },
        "law": None if p is None else one.law.fit.values,
        "notes": one.doubts,
    }  # fmt: skip
