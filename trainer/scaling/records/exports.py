"""Read exported tables of runs that were trained elsewhere, as one row per run.

    CSV, TSV, parquet  rows and columns unchanged; CSV and TSV may be compressed by gzip. Two
                       formats of wandb are recognised by their headers: the runs table (Name,
                       State, then the shown columns), and a chart (x-axis, then "RUN - METRIC" with
                       __MIN and __MAX beside it), of which the last value of each run is taken
    JSON, JSON lines   objects; those with `config` and `summary` are runs of wandb's API (with
                       `config`, `summary`, `name`, `state`); nested keys become dotted names
    a directory        of JSON files

Invariant: values are taken unchanged, and a run whose state is not "finished" is refused by name. A
chart has no states, and wandb thins it to 1,500 points per run or fewer.
"""

import ast
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from forescale.config.schema import shown
from forescale.errors import UserError

_TEXT = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}  # with their separators
_OBJECTS = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_TEXT, ".parquet", *_OBJECTS)
FINISHED = "finished"
# wandb.apis.public.Run.state, and further states that the table of runs shows.
_STATES = {FINISHED, "failed", "crashed", "killed", "running", "pending", "preempting", "preempted",
           "not found"}  # fmt: skip
_SEPARATOR = " - "  # between run and metric in a chart


@dataclass(frozen=True)
class Refused:
    """A run that can't be used as a record, and the reason."""

    name: str
    why: str


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
        found = {}
        for place, row in self.table.iterrows():
            if self.state and str(row[self.state]).lower() != FINISHED:
                found[place] = Refused(str(row[self.name]), f"its state is {row[self.state]}")
            elif missing := [name for name in needed if pd.isna(row[name])]:
                why = f"it has no value of {', '.join(missing)}"
                found[place] = Refused(str(row[self.name]), why)
        return found


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
        separator = next((own for end, own in _TEXT.items() if path.name.endswith(end)), None)
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
        own = ordered[[axis, *columns.values()]].dropna(subset=list(columns.values()), how="all")
        last = own.ffill().iloc[-1] if len(own) else pd.Series(index=own.columns, dtype=float)
        values = {metric: last[column] for metric, column in columns.items()}
        rows.append({"Name": run, axis: last[axis], **values})
    return Export(pd.DataFrame(rows), "Name")


def _objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON file: one object, a list of them, or one per line."""
    text = path.read_text(encoding="utf-8")
    try:
        made = json.loads(text)
    except json.JSONDecodeError:
        made = [json.loads(line) for line in text.splitlines() if line.strip()]
    made = made if isinstance(made, list) else [made]
    if not made or not all(isinstance(one, dict) for one in made):
        raise ValueError(f"{path.name} holds no objects")
    return made


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
    shown = ("display_name", "displayName", "name", "id")
    row = {"name": next((one[key] for key in shown if one.get(key)), "run")}
    row |= {key: one[key] for key in ("id", "state") if key in one}
    settings = {k: _bare(v) for k, v in _decoded(one["config"]).items() if not k.startswith("_")}
    row |= {f"config.{k}" if k in row else k: v for k, v in _dotted(settings)}
    for key, value in _dotted(_decoded(_summary(one))):
        row[f"summary.{key}" if key in row else key] = value
    return row


def _decoded(section: Any) -> dict[str, Any]:
    """Return a section as a dict; the service gives it as text."""
    made = json.loads(section) if isinstance(section, str) else section or {}
    if not isinstance(made, Mapping):
        raise ValueError(f"config or summary of a run is no object, but {shown(made)}")
    return dict(made)


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
            yield f"{above}{key}", _number(value)


def _number(value: Any) -> Any:
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
