"""Tables of runs that were trained elsewhere: as records, their columns mapped by name.

    CSV, TSV, parquet  rows and columns unchanged; CSV and TSV may be compressed by gzip. Two
                       formats of wandb are recognised by their headers: the runs table (Name,
                       State, then the selected columns), and a chart (x-axis, then "RUN - METRIC"
                       with __MIN and __MAX beside it), of which the last value of each run counts
    JSON, JSON lines   objects; those with `config` and `summary` are runs of wandb's API (with
                       `config`, `summary`, `name`, `state`); nested keys become dotted names
    a directory        of JSON files

Invariant: values are taken unchanged: a cell that is no usable number is refused with its place,
and a run whose state is not "finished" by its name. A chart has no states, and wandb thins it to
1,500 points a run or fewer. Imports no torch.
"""

import ast
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forescale.config.schema import display
from forescale.config.suggest import nearest_first
from forescale.config.tree import LARGEST, SMALLEST
from forescale.ground.errors import UserError
from forescale.scaling.fitting.points import COLUMNS
from forescale.scaling.records.records import KNOWN, NUMERIC, Refused

_TEXT = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}  # with their separators
_OBJECTS = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_TEXT, ".parquet", *_OBJECTS)
FINISHED = "finished"
# wandb.apis.public.Run.state, and further states that the table of runs shows.
_STATES = {FINISHED, "failed", "crashed", "killed", "running", "pending", "preempting", "preempted",
           "not found"}  # fmt: skip
_SEPARATOR = " - "  # between run and metric in a chart


@dataclass(frozen=True)
class Export:
    """A table with the names of its file.

    name, state: the columns with the name and the state of a run; None if there is no such column,
    or if the table has no known format.
    """

    table: pd.DataFrame
    name: str | None = None
    state: str | None = None

    def of(self, table: pd.DataFrame) -> "Export":
        """Return the export with another table."""
        return replace(self, table=table)

    def refused(self, needed: Sequence[str]) -> dict[Any, Refused]:
        """Return the runs that have not finished or lack a needed value, by their row index.

        Empty for a plain table, which has neither names nor states.
        """
        if self.name is None:
            return {}
        refusals = {}
        for place, row in self.table.iterrows():
            if self.state and str(row[self.state]).lower() != FINISHED:
                refusals[place] = Refused(str(row[self.name]), f"its state is {row[self.state]}")
            elif missing := [name for name in needed if pd.isna(row[name])]:
                why = f"it has no value of {', '.join(missing)}"
                refusals[place] = Refused(str(row[self.name]), why)
        return refusals


def is_export(path: Path) -> bool:
    """Return True for a file with the suffix of a table, and for a directory of dumped runs."""
    if not path.is_dir():
        return path.name.endswith(SUFFIXES)
    try:
        return any(_is_run(one) for file in _files(path)[:1] for one in _objects(file))
    except (OSError, ValueError, RecursionError):
        return False


def read_export(path: Path) -> Export:
    """Read a file or directory of any format above. Raises UserError if it can't be read."""
    try:
        separator = next((sign for end, sign in _TEXT.items() if path.name.endswith(end)), None)
        if path.is_dir() or not (separator or path.suffix == ".parquet"):
            return _of_objects(path, [o for p in _files(path) or [path] for o in _objects(p)])
        table = pd.read_csv(path, sep=separator) if separator else pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(str(path), "there is no such file", "check the path") from None
    except (OSError, EOFError, zlib.error, ValueError, ImportError, RecursionError,
            OverflowError) as e:  # fmt: skip
        problem = f"can't be read as a table ({(str(e).splitlines() or [type(e).__name__])[0]})"
        todo = (
            "give a CSV or TSV with a header (.csv, .tsv, .csv.gz, .tsv.gz), parquet, JSON lines, "
            "or a directory of JSON files"
        )
        raise UserError(str(path), problem, todo) from None
    if {"config", "summary", "name"} <= set(table.columns):  # the example in wandb's manual
        return _of_objects(path, [_parsed(path, row) for row in table.to_dict("records")])
    if metrics := _metrics(table):
        return _of_chart(table, metrics)
    return _of_runs_table(table)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.suffix in _OBJECTS)


def _of_runs_table(table: pd.DataFrame) -> Export:
    """Return an export of a table with one row per run, or of any other table.

    The headers of runs are capitalised by the web page and in lower case from scripts.
    """
    for name, state in (("Name", "State"), ("name", "state")):
        if {name, state} <= set(table.columns):
            states = set(table[state].dropna().astype(str).str.lower())
            if states and states <= _STATES:
                return Export(table, name, state)
    return Export(table)


def _metrics(table: pd.DataFrame) -> list[str]:
    """Return the columns of a chart without x-axis, __MIN and __MAX; empty for other tables."""
    columns = [str(c) for c in table.columns]
    return [
        c for c in columns[1:] if _SEPARATOR in c and {f"{c}__MIN", f"{c}__MAX"} <= set(columns)
    ]


def _of_chart(table: pd.DataFrame, metrics: Sequence[str]) -> Export:
    """Return a row per run: the last value of each metric, and its place on the x-axis."""
    axis = str(table.columns[0])
    ordered = table.sort_values(axis, kind="stable")
    groups: dict[str, dict[str, str]] = {}
    for column in metrics:
        run, metric = column.rsplit(_SEPARATOR, 1)
        groups.setdefault(run, {})[metric] = column
    rows = []
    for run, columns in groups.items():
        part = ordered[[axis, *columns.values()]].dropna(subset=list(columns.values()), how="all")
        last = part.ffill().iloc[-1] if len(part) else pd.Series(index=part.columns, dtype=float)
        values = {metric: last[column] for metric, column in columns.items()}
        rows.append({"Name": run, axis: last[axis], **values})
    return Export(pd.DataFrame(rows), "Name")


def _objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON file: one object, a list of them, or one per line."""
    text = path.read_text(encoding="utf-8")
    try:
        objects = json.loads(text)
    except json.JSONDecodeError:
        objects = [json.loads(line) for line in text.splitlines() if line.strip()]
    objects = objects if isinstance(objects, list) else [objects]
    if not objects or not all(isinstance(one, dict) for one in objects):
        raise ValueError(f"{path.name} holds no objects")
    return objects


def _of_objects(path: Path, objects: Iterable[Mapping[str, Any]]) -> Export:
    """Return a table of runs of wandb's API, or of plain rows."""
    objects = list(objects)
    of_wandb = list(map(_is_run, objects))
    if not any(of_wandb):
        return _of_runs_table(pd.json_normalize(objects))
    if not all(of_wandb):
        problem = (
            f"{of_wandb.count(False)} of its {len(objects)} objects have no config and summary"
        )
        raise UserError(str(path), problem, "leave them out")
    table = pd.DataFrame([_row(o) for o in objects])
    return Export(table, "name", "state" if "state" in table else None)


def _is_run(one: Mapping[str, Any]) -> bool:
    return "config" in one and _summary(one) is not None


def _summary(one: Mapping[str, Any]) -> Any:
    """Return the summary by its name in the API, in dumps, or in the JSON of the service."""
    names = ("summary", "summary_metrics", "summaryMetrics")
    return next((one[name] for name in names if name in one), None)


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, state, config and summary of a run.

    A key of the summary that the config has too becomes `summary.KEY`.
    """
    labels = ("display_name", "displayName", "name", "id")
    row = {"name": next((one[key] for key in labels if one.get(key)), "run")}
    row |= {key: one[key] for key in ("id", "state") if key in one}
    settings = {k: _bare(v) for k, v in _decoded(one["config"]).items() if not k.startswith("_")}
    row |= {f"config.{k}" if k in row else k: v for k, v in _dotted(settings)}
    for key, value in _dotted(_decoded(_summary(one))):
        row[f"summary.{key}" if key in row else key] = value
    return row


def _decoded(section: Any) -> dict[str, Any]:
    """Return a section as a dict; the service gives it as text."""
    value = json.loads(section) if isinstance(section, str) else section or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config or summary of a run is no object, but {display(value)}")
    return dict(value)


def _bare(value: Any) -> Any:
    """Return the value of a setting that may be wrapped as in config.yaml: {desc, value}."""
    is_wrapped = isinstance(value, dict) and "value" in value and set(value) <= {"desc", "value"}
    return value["value"] if is_wrapped else value


def _dotted(section: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the values of nested sections under dotted names."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", _unquoted(value)


def _unquoted(value: Any) -> Any:
    """Return a number for NaN and infinity, which JSON lacks and wandb writes as strings."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


class _Numbers(ast.NodeTransformer):
    """Replaces nan and inf, which are no literals in Python, by numbers."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return the number that a name stands for, or the name."""
        return ast.Constant(float(node.id)) if node.id in ("nan", "inf") else node


def _parsed(path: Path, row: dict[Any, Any]) -> dict[str, Any]:
    """Return a row with its sections parsed from the text of Python dicts."""
    try:
        trees = {name: ast.parse(row[name], mode="eval") for name in ("config", "summary")}
        return row | {k: ast.literal_eval(_Numbers().visit(tree)) for k, tree in trees.items()}
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):  # "[" * 1000
        problem = f"config and summary of {row['name']} are not dicts"
        raise UserError(str(path), problem, "write them as Python dicts or JSON objects") from None


def of_export(
    path: Path, columns: Mapping[str, str], rows: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[Refused]]:
    """Return the records of a table, and the refusals.

    columns: {our name: name in the table}, beside the columns that have our names already; rows:
    {name in the table: value}, keeps only the rows with these values. Of an export of wandb,
    runs that haven't finished or lack a mapped value are refused. Raises UserError if the file
    can't be read, if a column is missing, or if no row is left.
    """
    export = _only(path, read_export(path), rows or {})
    table = export.table
    _must_have(path, table, [*columns.values()])
    for field in columns:
        if field not in KNOWN:
            todo = f"use one of {', '.join(KNOWN)}"
            raise UserError(f"columns.{field}", "is not a column of a record", todo)
    alike = {name: name for name in KNOWN if name in table.columns and name not in columns}
    named = {} if "name" in alike or "name" in columns or not export.name else {"name": export.name}
    chosen = {**named, **alike, **columns}
    if "loss" not in chosen:
        near = ", ".join(map(repr, nearest_first("loss", map(str, table.columns))[:3]))
        todo = f"name it, such as columns={{loss: final_loss}}; the nearest are {near}"
        raise UserError(str(path), "has no column 'loss'", todo)
    refused = export.refused([column for field, column in columns.items() if field in COLUMNS])
    usable = table[~table.index.isin(refused)]
    if table.empty:
        raise UserError(str(path), "has no rows", "give a table with a row for each run")
    if usable.empty:
        why = next(iter(refused.values())).why
        problem = f"none of its {len(table)} runs is finished and has {', '.join(chosen)}"
        raise UserError(
            str(path), f"{problem}; of the first, {why}", "choose other rows or columns"
        )
    cells = {
        o: _numbers(path, t, usable[t]) if o in NUMERIC else usable[t] for o, t in chosen.items()
    }
    return _expect_budgets(path, pd.DataFrame(cells)), list(refused.values())


def _number(cell: Any) -> float:
    """Return a cell as a number: NaN if it is none, infinity if it is too large for one."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:
        return math.inf


def _expect_budgets(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return the table, without its column of budgets if all are empty. Raises UserError if only
    some are, or if one isn't positive."""
    if "budget" not in table or table["budget"].isna().all():
        return table.drop(columns="budget", errors="ignore")
    if (bad := table.index[~table["budget"].between(SMALLEST, LARGEST)]).size:
        cell = table["budget"][bad[0]]
        problem = "is empty" if math.isnan(cell) else f"{cell:g} is not a positive number"
        where = f"{path}, budget of row {bad[0]}"
        todo = "give each run the budget that it belongs to, or leave out the column"
        raise UserError(where, problem, todo)
    return table


def _numbers(path: Path, column: str, cells: pd.Series) -> pd.Series:
    """Return the cells of a column as numbers; an empty one is NaN. Raises UserError for the first
    that is no number of usual size."""
    numbers = cells.map(_number).astype(float)
    is_usual = numbers.abs().between(SMALLEST, LARGEST) | (numbers == 0)
    wrong = cells.notna() & ~is_usual & (cells != numbers)  # not the infinite loss of a run
    wrong |= np.isfinite(numbers) & ~is_usual
    if wrong.any():
        row, cell = next((row, cell) for row, cell in cells[wrong].items())
        where = f"{path}, column {column!r}, row {row}"  # 0 is the first below the header
        todo = "write plain numbers, such as 7503872 or 7.5e6, and nothing in an empty cell"
        raise UserError(where, f"{display(cell)} is not a number that can be used", todo)
    return numbers


def _only(path: Path, export: Export, rows: Mapping[str, str]) -> Export:
    """Return the rows that have these values."""
    table = export.table
    _must_have(path, table, [*rows])
    for column, value in rows.items():
        values = table[column].astype(str)
        if not (values == value).any():
            near = ", ".join(nearest_first(value, values.unique())[:3])
            raise UserError(str(path), f"no row has {column}={value!r}", f"use one of: {near}")
        table = table[values == value]
    return export.of(table)


def _must_have(path: Path, table: pd.DataFrame, names: Sequence[str]) -> None:
    """Raise UserError if the table lacks one of these columns."""
    for name in names:
        if name not in table.columns:
            near = ", ".join(map(repr, nearest_first(name, map(str, table.columns))[:3]))
            problem = f"has no column {name!r}"
            raise UserError(
                str(path), problem, f"the nearest of its {len(table.columns)} are {near}"
            )
