"""The two groups of runs that `study compare` reads, each as records with a name.

    A B            two tables, two studies (by name or directory), or two names of runs
    one, by=COL    one table, the runs or the cells of a study, told apart by a column

Invariant: the first group is the reference. A column with more than two values needs `groups`.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from forescale.config.suggest import nearest_first
from forescale.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.records.tables import is_export, read_export
from forescale.scaling.study.inputs import cells_of, read

Group = tuple[str, pd.DataFrame, str]  # its name, its records, and how messages call them


def read_groups(job: StudyJob) -> tuple[Group, Group]:
    """Return both groups. Raises UserError if there are not two, or if one can't be read."""
    if job.by is not None:
        return _by_column(job, job.by)
    if job.groups:
        todo = "name the column that tells the groups apart, by=COLUMN"
        raise UserError("groups", "are given without a column", todo)
    if len(job.input) != 2:
        todo = "give two tables, studies or names of runs, or one with by=COLUMN"
        raise UserError("study compare", f"has {len(job.input)} inputs, not two", todo)
    if job.input[0] == job.input[1]:
        raise UserError(job.input[0], "is given twice", "give two different groups")
    stems = [Path(name).stem for name in job.input]
    names = stems if len(set(stems)) == 2 and is_export(Path(job.input[0])) else job.input
    one, other = ((name, *_read(job, given)) for name, given in zip(names, job.input, strict=True))
    return one, other


def _read(job: StudyJob, name: str) -> tuple[pd.DataFrame, str]:
    """Return the records of a study, if it is one, or of a table or of runs."""
    for folder in (Path(name).expanduser(), Path(job.studies).expanduser() / name):
        if (folder / "plan.json").is_file():
            return cells_of(folder)
    return read(replace(job, input=[name]))


def _by_column(job: StudyJob, column: str) -> tuple[Group, Group]:
    """Return the runs of two values of a column."""
    path = Path(job.input[0]).expanduser() if len(job.input) == 1 else None
    if path is not None and is_export(path):
        # A record has no columns of the table's own, so that the values are read from the file.
        raw = read_export(path).table
        for name, value in job.rows.items():
            raw = raw[raw[name].astype(str) == value] if name in raw else raw
        one, other = _two(str(path), raw, column, job.groups)

        def of(value: str) -> Group:
            rows = {**job.rows, column: value}
            table, where = read(replace(job, rows=rows))
            return value, table, f"{where}, {column}={value}"

        return of(one), of(other)
    table, where = read(job)
    one, other = _two(where, table, column, job.groups)
    own = table[column].astype(str)
    first, second = ((v, table[own == v], f"{where}, {column}={v}") for v in (one, other))
    return first, second


def _two(where: str, table: pd.DataFrame, column: str, groups: list[str]) -> tuple[str, str]:
    """Return the two values to compare. Raises UserError if the column doesn't give two."""
    if column not in table:
        near = ", ".join(map(repr, nearest_first(column, map(str, table.columns))[:3]))
        raise UserError(where, f"has no column {column!r}", f"the nearest are {near}")
    values = [str(v) for v in table[column].dropna().unique()]
    chosen = groups or values
    if unknown := [v for v in groups if v not in values]:
        todo = f"use two of {', '.join(values[:8])}"
        raise UserError("groups", f"no run has {column}={unknown[0]}", todo)
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        problem = f"has {len(values)} values of {column}: {', '.join(values[:8])}"
        raise UserError(where, problem, "name two of them: groups=[A,B]")
    return chosen[0], chosen[1]
