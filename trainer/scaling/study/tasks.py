"""What is read of tasks: for `study tasks` one table of runs, or one of runs and one of their
checkpoints; for `task=` the metric of each record.

Invariant: the loss and the metric are of the same row. A metric is a share, never a percentage, or
a loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from forescale.config.suggest import nearest_first
from forescale.errors import UserError
from forescale.scaling.analysis.task_fit import OUTCOME, Task
from forescale.scaling.config import StudyJob
from forescale.scaling.records.tables import is_export, read_export
from forescale.scaling.study.inputs import read, read_each
from forescale.scaling.tasks.judge import Ladder, ladder


def read_tasks(job: StudyJob) -> list[Task]:
    """Return what is known of each task. Raises UserError for other inputs or missing columns."""
    if not job.tasks:
        todo = "name their columns, such as tasks='{arc: acc_arc}'"
        raise UserError("tasks", "are not given", todo)
    if strange := set(job.task_losses) - set(job.tasks):
        todo = f"name some of {', '.join(job.tasks)}"
        raise UserError(f"task_losses.{min(strange)}", "is no task", todo)
    if not 1 <= len(job.input) <= 2 or not all(is_export(Path(name)) for name in job.input):
        todo = "give a table of runs, and perhaps a second one of their checkpoints"
        raise UserError("study tasks", "reads tables alone", todo)
    found = [_read(job, name) for name in job.input]
    (runs, raw_of_runs, where), (rows, raw, where_of_rows) = found[0], found[-1]
    tasks = []
    for name, column in job.tasks.items():
        loss = job.task_losses.get(name)
        outcomes = _with_loss(rows, raw, loss, where_of_rows)
        cells = _column(raw, column, where_of_rows).loc[rows.index]
        outcomes = outcomes.assign(**{OUTCOME: _outcomes(cells, job, where_of_rows)})
        tasks.append(Task(name, _with_loss(runs, raw_of_runs, loss, where), outcomes, where))
    return tasks


def with_outcome(table: pd.DataFrame, job: StudyJob, where: str) -> pd.DataFrame:
    """Return records with the column `task` of the job as `outcome`; unchanged if it names none.

    Raises UserError if there is no such column, or if it doesn't hold the job's metric.
    """
    if job.task is None:
        return table
    cells = _column(_raw(table, job), job.task, where).loc[table.index]
    return table.assign(**{OUTCOME: _outcomes(cells, job, where)})


def with_columns(table: pd.DataFrame, job: StudyJob, names: Sequence[str]) -> pd.DataFrame:
    """Return records with further columns of their table, as far as it has them."""
    raw = _raw(table, job)
    return table.assign(**{name: raw[name].loc[table.index] for name in names if name in raw})


def _raw(table: pd.DataFrame, job: StudyJob) -> pd.DataFrame:
    """Return the table that records are from, with all its columns, or the records themselves."""
    if len(job.input) == 1 and is_export(path := Path(job.input[0]).expanduser()):
        return read_export(path).table
    return table


def read_ladders(job: StudyJob) -> list[Ladder]:
    """Return the runs of each table of the input with their metric; see inputs.read_each."""
    return read_each(
        job, lambda table, own, where: ladder(with_outcome(table, own, where), own, where)
    )


def _read(job: StudyJob, name: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return the records of a table, the table itself with the same index, and how to call it."""
    raw = read_export(Path(name).expanduser()).table
    columns = dict(job.columns)
    if "loss" not in columns and "loss" not in raw and job.task_losses:
        columns["loss"] = next(iter(job.task_losses.values()))
    table, where = read(replace(job, input=[name], columns=columns))
    return table, raw, where


def _with_loss(
    table: pd.DataFrame, raw: pd.DataFrame, column: str | None, where: str
) -> pd.DataFrame:
    """Return the records with a task's own loss, or with that of the table."""
    if column is None:
        return table
    return table.assign(loss=_numbers(_column(raw, column, where).loc[table.index], where))


def _column(raw: pd.DataFrame, name: str, where: str) -> pd.Series:
    """Return a column of the file. Raises UserError, with the nearest names, if there is none."""
    if name not in raw:
        near = ", ".join(map(repr, nearest_first(name, map(str, raw.columns))[:3]))
        raise UserError(where, f"has no column {name!r}", f"the nearest are {near}")
    column: pd.Series = raw[name]
    return column


def _numbers(cells: pd.Series, where: str) -> pd.Series:
    """Return the cells as numbers, NaN if empty. Raises UserError for anything else."""
    numbers = pd.to_numeric(cells, errors="coerce")
    if (bad := numbers.isna() & cells.notna()).any():
        problem = f"{cells[bad].iloc[0]!r} of column {cells.name!r} is no number"
        raise UserError(where, problem, "write plain numbers, and nothing in an empty cell")
    return numbers


def _outcomes(cells: pd.Series, job: StudyJob, where: str) -> pd.Series:
    """Return the cells as links read them: accuracies, or losses. Raises UserError for other
    values."""
    values = _numbers(cells, where)
    if job.metric == "loss":
        if (bad := (values <= 0) | np.isinf(values)).any():
            problem = f"{values[bad].iloc[0]:g} of column {cells.name!r} is not a positive number"
            raise UserError(
                where, problem, "a metric without an upper end is positive, as a loss is"
            )
        return values
    if (bad := (values < 0) | (values > 1)).any():
        problem = f"{values[bad].iloc[0]:g} of column {cells.name!r} is not between 0 and 1"
        todo = "give shares, not percentages; of a task's loss, write metric=loss"
        raise UserError(where, problem, todo)
    return 1 - values if job.metric == "error" else values
