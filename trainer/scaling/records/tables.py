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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forescale.config.schema import display
from forescale.config.suggest import nearest_first
from forescale.config.tree import LARGEST, SMALLEST
from forescale.data.text.opening import open_raw, open_stream
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_text
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


def is_export(path: Path) -> bool:
    """Return True for a file with the suffix of a table, and for a directory of dumped runs."""
    if not path.is_dir():
        return path.name.endswith(SUFFIXES)
    try:
        return any(_is_run(one) for file in _files(path)[:1] for one in _objects(file))
    except (OSError, ValueError, RecursionError, UserError):
        return False


def read_export(path: Path) -> Export:
    """Read a file or directory of any format above. Raises UserError if it can't be read."""
    try:
        separator = next((sign for end, sign in _TEXT.items() if path.name.endswith(end)), None)
        if path.is_dir() or not (separator or path.suffix == ".parquet"):
            files = _files(path) if path.is_dir() else [path]
            return _of_objects(path, [o for p in files or [path] for o in _objects(p)])
        if separator:
            with open_stream(path.name, str(path)) as file:
                table = pd.read_csv(file, sep=separator)
        else:
            with open_raw(str(path)) as raw:
                table = pd.read_parquet(raw)
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
    columns = [str(c) for c in table.columns]
    metrics = [c for c in columns[1:]
               if _SEPARATOR in c and {f"{c}__MIN", f"{c}__MAX"} <= set(columns)]  # fmt: skip
    return _of_chart(table, metrics) if metrics else _of_runs_table(table)


def _files(path: Path) -> list[Path]:
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
    text = read_text(path, 1 << 30)
    try:
        objects = json.loads(text)
    except json.JSONDecodeError:
        objects = [json.loads(line) for line in text.splitlines() if line.strip()]
    objects = objects if isinstance(objects, list) else [objects]
    if not objects or not all(isinstance(one, dict) for one in objects):
        raise ValueError(f"{path.name} holds no objects")
    return objects


def _of_objects(path: Path, objects: Sequence[Mapping[str, Any]]) -> Export:
    """Return a table of runs of wandb's API, or of plain rows.

    A key of a run's summary that its config has too becomes `summary.KEY`.
    """
    plain = [_is_run(one) for one in objects].count(False)
    if plain == len(objects):
        return _of_runs_table(pd.json_normalize(list(objects)))
    if plain:
        problem = f"{plain} of its {len(objects)} objects have no config and summary"
        raise UserError(str(path), problem, "leave them out")
    rows = []
    for one in objects:
        labels = ("display_name", "displayName", "name", "id")
        row = {"name": next((one[key] for key in labels if one.get(key)), "run")}
        row |= {key: one[key] for key in ("id", "state") if key in one}
        settings = {
            # A setting may be wrapped as in config.yaml: {desc, value}.
            k: v["value"] if isinstance(v, dict) and {"value"} <= set(v) <= {"desc", "value"} else v
            for k, v in _decoded(one["config"]).items()
            if not k.startswith("_")
        }
        row |= {f"config.{k}" if k in row else k: v for k, v in _dotted(settings)}
        for key, value in _dotted(_decoded(_summary(one))):
            row[f"summary.{key}" if key in row else key] = value
        rows.append(row)
    table = pd.DataFrame(rows)
    return Export(table, "name", "state" if "state" in table else None)


def _is_run(one: Mapping[str, Any]) -> bool:
    return "config" in one and _summary(one) is not None


def _summary(one: Mapping[str, Any]) -> Any:
    """Return the summary by its name in the API, in dumps, or in the JSON of the service."""
    names = ("summary", "summary_metrics", "summaryMetrics")
    return next((one[name] for name in names if name in one), None)


def _decoded(section: Any) -> dict[str, Any]:
    """Return a section as a dict; the service gives it as text."""
    value = json.loads(section) if isinstance(section, str) else section or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config or summary of a run is no object, but {display(value)}")
    return dict(value)


def _dotted(section: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the values of nested sections under dotted names; NaN and infinity, which JSON lacks
    and wandb writes as strings, as numbers."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")
        else:
            is_number = value in ("NaN", "Infinity", "-Infinity")
            yield f"{above}{key}", float(value) if is_number else value


class _Numbers(ast.NodeTransformer):
    """Replaces nan and inf, which are no literals in Python, by numbers."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("nan", "inf") else node


def _parsed(path: Path, row: dict[Any, Any]) -> dict[str, Any]:
    """Return a row with its sections parsed from the text of Python dicts."""
    try:
        trees = {name: ast.parse(row[name], mode="eval") for name in ("config", "summary")}
        return row | {k: ast.literal_eval(_Numbers().visit(tree)) for k, tree in trees.items()}
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):  # "[" * 1000
        problem = f"config and summary of {row['name']} are not dicts"
        raise UserError(str(path), problem, "write them as Python dicts or JSON objects") from None


def column_of(table: pd.DataFrame, name: str, where: str, hint: str = "") -> pd.Series:
    """Return a column of a file. Raises UserError, with the nearest names, if there is none."""
    if name not in table:
        near = ", ".join(map(repr, nearest_first(name, map(str, table.columns))[:3]))
        raise UserError(where, f"has no column {name!r}", f"{hint}the nearest are {near}")
    column: pd.Series = table[name]
    return column


def of_export(
    path: Path, columns: Mapping[str, str], rows: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[Refused]]:
    """Return the records of a table, and the refusals.

    columns: {our name: name in the table}, beside the columns that have our names already; rows:
    {name in the table: value}, keeps only the rows with these values. Of an export of wandb,
    runs that haven't finished or lack a mapped value are refused. Raises UserError if the file
    can't be read, if a column is missing, or if no row is left.
    """
    export, where = read_export(path), str(path)
    table = export.table
    for column in (*(rows or {}), *columns.values()):
        column_of(table, column, where)
    for column, cell in (rows or {}).items():
        values = table[column].astype(str)
        if not (values == cell).any():
            near = ", ".join(nearest_first(cell, values.unique())[:3])
            raise UserError(where, f"no row has {column}={cell!r}", f"use one of: {near}")
        table = table[values == cell]
    for field in columns:
        if field not in KNOWN:
            todo = f"use one of {', '.join(KNOWN)}"
            raise UserError(f"columns.{field}", "is not a column of a record", todo)
    mixed = [name for name in map(str, table.columns) if name.startswith(("share_", "loss_"))]
    known = dict.fromkeys((*KNOWN, *(mixed if any(n.startswith("share_") for n in mixed) else ())))
    alike = {name: name for name in known if name in table.columns and name not in columns}
    named = {} if "name" in alike or "name" in columns or not export.name else {"name": export.name}
    chosen = {**named, **alike, **columns}
    if "loss" not in chosen:
        column_of(table, "loss", where, "name it, such as columns={loss: final_loss}; ")
    if table.empty:
        raise UserError(where, "has no rows", "give a table with a row for each run")
    needed = [column for field, column in columns.items() if field in COLUMNS]
    refused: dict[Any, Refused] = {}  # by row index; a plain table has neither names nor states
    for place, row in table.iterrows() if export.name else ():
        if export.state and str(row[export.state]).lower() != FINISHED:
            refused[place] = Refused(str(row[export.name]), f"its state is {row[export.state]}")
        elif missing := [name for name in needed if pd.isna(row[name])]:
            why = f"it has no value of {', '.join(missing)}"
            refused[place] = Refused(str(row[export.name]), why)
    usable = table[~table.index.isin(refused)]
    if usable.empty:
        problem = (
            f"none of its {len(table)} runs is finished and has {', '.join(chosen)}; of the first, "
            f"{next(iter(refused.values())).why}"
        )
        raise UserError(where, problem, "choose other rows or columns")
    return _records(where, usable, chosen), list(refused.values())


def _records(where: str, table: pd.DataFrame, chosen: Mapping[str, str]) -> pd.DataFrame:
    """Return the chosen columns of a table by our names, {ours: theirs}. Raises UserError for a
    number or a budget that can't be used."""
    records = pd.DataFrame({
        field: _numbers(where, column, table[column]) if field in NUMERIC else table[column]
        for field, column in chosen.items()
    })  # fmt: skip
    if "budget" not in records or records["budget"].isna().all():
        records = records.drop(columns="budget", errors="ignore")
    elif (bad := records.index[~records["budget"].between(SMALLEST, LARGEST)]).size:
        budget = records["budget"][bad[0]]
        problem = "is empty" if math.isnan(budget) else f"{budget:g} is not a positive number"
        todo = "give each run the budget that it belongs to, or leave out the column"
        raise UserError(f"{where}, budget of row {bad[0]}", problem, todo)
    return records


def _numbers(where: str, column: str, cells: pd.Series) -> pd.Series:
    """Return the cells of a column as numbers; an empty one is NaN. Raises UserError for the first
    that is no number of usual size."""

    def number(cell: Any) -> float:
        try:
            return float(cell)
        except (TypeError, ValueError):
            return math.nan
        except OverflowError:  # an integer that is too large
            return math.inf

    numbers = cells.map(number).astype(float)
    is_usual = numbers.abs().between(SMALLEST, LARGEST) | (numbers == 0)
    wrong = cells.notna() & ~is_usual & (cells != numbers)  # not the infinite loss of a run
    wrong |= np.isfinite(numbers) & ~is_usual
    if wrong.any():
        row, cell = next((row, cell) for row, cell in cells[wrong].items())
        place = f"{where}, column {column!r}, row {row}"  # 0 is the first below the header
        todo = "write plain numbers, such as 7503872 or 7.5e6, and nothing in an empty cell"
        raise UserError(place, f"{display(cell)} is not a number that can be used", todo)
    return numbers
