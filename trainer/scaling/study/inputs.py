"""What an action of a study reads: the study's cells, runs, or tables of others; the two groups of
a comparison; the metric of a task.

    A B            two groups: tables, studies (by name or directory), or names of runs
    one, by=COL    one table, the runs or the cells of a study, told apart by a column

Invariant: a loss and a metric are of the same row. A metric is a share, never a percentage, or a
loss. Of two groups, the first is the reference. Notes about what gives no record go to standard
error.
"""

import glob
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.scaling.analysis.backtest import Finished, finished
from forescale.scaling.analysis.task_fit import OUTCOME
from forescale.scaling.config import StudyJob
from forescale.scaling.records.records import of_runs
from forescale.scaling.records.tables import SUFFIXES, column_of, is_export, of_export, read_export
from forescale.scaling.study.directory import PLANNED, Study

Group = tuple[str, pd.DataFrame, str]  # its name, its records, and their name in messages


def read(job: StudyJob) -> tuple[pd.DataFrame, str]:
    """Return the records, and their name in messages. Raises UserError if there are none."""
    if not job.input:
        if not (job.folder / "plan.json").is_file():
            todo = "name runs or a table (forescale study fit 'runs/*'), or plan a study first"
            raise UserError("input", f"names no runs, and {job.folder} holds no plan", todo)
        return _cells_of(job.folder)
    paths, runs = [Path(name).expanduser() for name in job.input], list[Run]()
    if any(map(is_export, paths)):
        if len(paths) > 1:
            raise UserError("input", "mixes tables and runs", "give one table, or runs")
        table, refused = of_export(paths[0], job.columns, job.rows)
        raw = {*_raw(table, job)}
        if raw >= {*PLANNED, f"flops_{job.cost}", f"parameters_{job.size}"}:  # of a study's page
            table = with_columns(table, job, sorted(raw - {*table, "folder"}))
            if "edges" in table:
                table["edges"] = [tuple(re.findall(r"\w+", str(x))) for x in table["edges"]]
    else:
        runs = [run for name in job.input for run in _runs(name, Path(job.run.root).expanduser())]
        table, refused = of_runs(runs)
    for one in refused:
        print(f"Note: {one.name} gives no record: {one.why}.", file=sys.stderr)
    if runs and table.empty:
        problem = f"none of {len(runs)} runs is complete and evaluated"
        raise UserError(" ".join(job.input), problem, "train them to their end")
    return table, f"{len(table)} runs" if runs else str(paths[0])


def _cells_of(folder: Path) -> tuple[pd.DataFrame, str]:
    """Return the records of a planned study's complete cells, and their name in messages."""
    table = Study(folder).table()
    if table.empty:
        todo = f"forescale study launch study={folder.name}"
        raise UserError(str(folder), "none of its cells is complete", todo)
    return table, f"{len(table)} cells of {folder}"


def _runs(name: str, root: Path) -> list[Run]:
    """Return the runs of a name: a run, a directory of runs, or a glob pattern of either."""
    for base in (Path(), root):
        paths = sorted(map(Path, glob.glob(str(base / name))))
        runs = [Run(path) for path in paths if (path / "config.yaml").is_file()]
        inside = [Run(c.parent) for path in paths for c in sorted(path.glob("[!.]*/config.yaml"))]
        if runs or inside:
            return runs or inside
    if Path(name).is_file():
        todo = f"give a file with one of the endings {', '.join(SUFFIXES)}"
        raise UserError(name, "is no table by the ending of its name", todo)
    raise UserError(name, f"names no run (looked in {root} too)", "see forescale status")


def read_finished(job: StudyJob) -> list[Finished]:
    """Return the finished runs of each table of the input, with `task` those that have its metric;
    one for runs or the study's cells. Names may be glob patterns of tables. Of several tables, one
    that can't be judged is left out with a note. Raises UserError if none is left."""
    paths = _tables(job.input)
    if len(paths) < 2:
        return [_finished(replace(job, input=list(map(str, paths)) or job.input))]
    stems = [path.stem for path in paths]
    tables, errors = list[Finished](), list[UserError]()
    for path, stem in zip(paths, stems, strict=True):
        try:
            one = _finished(replace(job, input=[str(path)]))
        except UserError as e:
            errors.append(e)
            print(f"Note: {path} is left out: {e.problem}.", file=sys.stderr)
            continue
        tables.append(replace(one, name=stem) if stems.count(stem) == 1 else one)
    if not tables:
        problem = f"none of {len(paths)} tables can be judged; the first {errors[0].problem}"
        raise UserError("input", problem, errors[0].todo)
    return tables


def _finished(job: StudyJob) -> Finished:
    table, where = read(job)
    return finished(with_outcome(table, job, where), job, where, has_metric=job.task is not None)


def _tables(names: list[str]) -> list[Path]:
    """Return the tables of names and glob patterns, each once; none if the names are of runs."""
    paths = list[Path]()
    for name in names:
        pattern = str(Path(name).expanduser())
        paths += map(Path, sorted(glob.glob(pattern)) or [pattern])
    tables = [path for path in dict.fromkeys(paths) if is_export(path)]
    if tables and len(tables) < len(set(paths)):
        other = next(path for path in paths if path not in tables)
        raise UserError(str(other), "is no table, as others of the input are", "give tables alone")
    return tables


def read_groups(job: StudyJob) -> tuple[Group, Group]:
    """Return the two groups to compare. Raises UserError if there are not two, or if one can't be
    read."""
    if job.by is not None:
        return _groups_by_column(job, job.by)
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
    groups = list[Group]()
    for name, source in zip(names, job.input, strict=True):
        folders = Path(source).expanduser(), Path(job.studies).expanduser() / source
        study = next((f for f in folders if (f / "plan.json").is_file()), None)
        table, where = _cells_of(study) if study else read(replace(job, input=[source]))
        groups.append((name, table, where))
    return groups[0], groups[1]


def _groups_by_column(job: StudyJob, column: str) -> tuple[Group, Group]:
    """Return the runs of two values of a column."""
    path = Path(job.input[0]).expanduser() if len(job.input) == 1 else None
    if path is not None and is_export(path):
        # Records have no columns of the table's, so that the values are read from the file.
        raw = read_export(path).table
        for name, value in job.rows.items():
            raw = raw[raw[name].astype(str) == value] if name in raw else raw
        values = _two_values(str(path), raw, column, job.groups)
        tables = [read(replace(job, rows={**job.rows, column: value})) for value in values]
    else:
        table, where = read(job)
        values = _two_values(where, table, column, job.groups)
        tables = [(table[table[column].astype(str) == value], where) for value in values]
    first, second = (
        (value, table, f"{where}, {column}={value}")
        for value, (table, where) in zip(values, tables, strict=True)
    )
    return first, second


def _two_values(where: str, table: pd.DataFrame, column: str, groups: list[str]) -> tuple[str, str]:
    """Return the two values to compare. Raises UserError if the column doesn't give two."""
    values = [str(v) for v in column_of(table, column, where).dropna().unique()]
    chosen = groups or values
    if unknown := [v for v in groups if v not in values]:
        todo = f"use two of {', '.join(values[:8])}"
        raise UserError("groups", f"no run has {column}={unknown[0]}", todo)
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        problem = f"has {len(values)} values of {column}: {', '.join(values[:8])}"
        raise UserError(where, problem, "name two of them: groups=[A,B]")
    return chosen[0], chosen[1]


def with_outcome(table: pd.DataFrame, job: StudyJob, where: str) -> pd.DataFrame:
    """Return records with the column `task` of the job as `outcome`; unchanged if it names none.
    Raises UserError if there is no such column, or if it doesn't hold the job's metric."""
    if job.task is None:
        return table
    cells = column_of(_raw(table, job), job.task, where).loc[table.index]
    return table.assign(**{OUTCOME: _outcomes(cells, job, where)})


def with_columns(table: pd.DataFrame, job: StudyJob, names: Sequence[str]) -> pd.DataFrame:
    """Return records with those of these columns that their table has."""
    raw = _raw(table, job)
    return table.assign(**{name: raw[name].loc[table.index] for name in names if name in raw})


def _raw(table: pd.DataFrame, job: StudyJob) -> pd.DataFrame:
    """Return the table that records are from, with all its columns, or the records themselves."""
    if len(job.input) == 1 and is_export(path := Path(job.input[0]).expanduser()):
        return read_export(path).table
    return table


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
        bad = (values <= 0) | np.isinf(values)
        problem = "is not a positive number"
        todo = "a metric without an upper end is positive, as a loss is"
    else:
        bad = (values < 0) | (values > 1)
        problem = "is not between 0 and 1"
        todo = "give shares, not percentages; of a task's loss, write metric=loss"
    if bad.any():
        problem = f"{values[bad].iloc[0]:g} of column {cells.name!r} {problem}"
        raise UserError(where, problem, todo)
    return 1 - values if job.metric == "error" else values
