"""What an action of a study reads: the study's cells, runs, or tables of others.

Notes about what gives no record go to standard error.
"""

import glob
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pandas as pd

from forescale.errors import UserError
from forescale.run.directory import Run
from forescale.scaling.analysis.backtest import Finished, finished
from forescale.scaling.config import StudyJob
from forescale.scaling.records.records import Refused, of_runs
from forescale.scaling.records.tables import SUFFIXES, is_export, of_export
from forescale.scaling.study.directory import Study
from forescale.scaling.tasks.judge import Ladder

Judged = TypeVar("Judged", Finished, Ladder)


def read(job: StudyJob) -> tuple[pd.DataFrame, str]:
    """Return the records, and how messages call them. Raises UserError if there are none."""
    if not job.input:
        if not (job.folder / "plan.json").is_file():
            todo = "name runs or a table (forescale study fit 'runs/*'), or plan a study first"
            raise UserError("input", f"names no runs, and {job.folder} holds no plan", todo)
        return cells_of(job.folder)
    paths = [Path(name).expanduser() for name in job.input]
    if any(map(is_export, paths)):
        if len(paths) > 1:
            raise UserError("input", "mixes tables and runs", "give one table, or runs")
        table, refused = of_export(paths[0], job.columns, job.rows)
        _print_refused(refused)
        return table, str(paths[0])
    runs = [run for name in job.input for run in _runs(name, Path(job.run.root).expanduser())]
    table, refused = of_runs(runs)
    _print_refused(refused)
    if table.empty:
        problem = f"none of {len(runs)} runs is complete and evaluated"
        raise UserError(" ".join(job.input), problem, "train them to their end")
    return table, f"{len(table)} runs"


def cells_of(folder: Path) -> tuple[pd.DataFrame, str]:
    """Return the records of a planned study's complete cells, and their name in messages. Raises
    UserError if there are none."""
    table = Study(folder).table()
    if table.empty:
        todo = f"forescale study launch study={folder.name}"
        raise UserError(str(folder), "none of its cells is complete", todo)
    return table, f"{len(table)} cells of {folder}"


def read_finished(job: StudyJob) -> list[Finished]:
    """Return a finished study for each table of the input; see read_each."""
    return read_each(job, lambda table, own, where: finished(table, own, where))


def read_each(
    job: StudyJob, judged: Callable[[pd.DataFrame, StudyJob, str], Judged]
) -> list[Judged]:
    """Return what `judged` makes of each table of the input: of its records, the job of this table
    alone, and its name; one for runs or the study's own cells.

    Names may be glob patterns of tables. Of several tables, one that can't be judged is left out
    with a note. Raises UserError if none is left.
    """
    paths = _tables(job.input)
    if len(paths) < 2:
        own = replace(job, input=list(map(str, paths)) or job.input)
        table, where = read(own)
        return [judged(table, own, where)]
    stems = [path.stem for path in paths]
    found, errors = list[Judged](), list[UserError]()
    for path, stem in zip(paths, stems, strict=True):
        try:
            own = replace(job, input=[str(path)])
            table, where = read(own)
            made = judged(table, own, where)
        except UserError as e:
            errors.append(e)
            print(f"Note: {path} is left out: {e.problem}.", file=sys.stderr)
            continue
        found.append(replace(made, name=stem if stems.count(stem) == 1 else where))
    if not found:
        problem = f"none of {len(paths)} tables can be judged; the first {errors[0].problem}"
        raise UserError("input", problem, errors[0].todo)
    return found


def _tables(names: list[str]) -> list[Path]:
    """Return the tables of names and glob patterns, each once; none if the names are of runs."""
    found = list[Path]()
    for name in names:
        path = str(Path(name).expanduser())
        found += map(Path, sorted(glob.glob(path)) or [path])
    tables = [path for path in dict.fromkeys(found) if is_export(path)]
    if tables and len(tables) < len(set(found)):
        other = next(path for path in found if path not in tables)
        raise UserError(str(other), "is no table, as others of the input are", "give tables alone")
    return tables


def _print_refused(refused: list[Refused]) -> None:
    for one in refused:
        print(f"Note: {one.name} gives no record: {one.why}.", file=sys.stderr)


def _runs(name: str, root: Path) -> list[Run]:
    """The runs of a name: a run, a directory of runs, or a glob pattern of either."""
    for base in (Path(), root):
        found = sorted(map(Path, glob.glob(str(base / name))))
        runs = [Run(path) for path in found if (path / "config.yaml").is_file()]
        inside = [Run(c.parent) for path in found for c in sorted(path.glob("[!.]*/config.yaml"))]
        if runs or inside:
            return runs or inside
    if Path(name).is_file():
        todo = f"give a file with one of the endings {', '.join(SUFFIXES)}"
        raise UserError(name, "is no table by the ending of its name", todo)
    raise UserError(name, f"names no run (looked in {root} too)", "see forescale status")
