"""Tables of runs that were trained elsewhere: files that others export, as one row a run.

    CSV, parquet       rows and columns as they stand. Two shapes of wandb's are known by their
                       headers: the runs table (Name, State, then what its columns show), and a
                       chart (its x-axis, then "RUN - METRIC" with __MIN and __MAX beside it), of
                       which the last value of each run counts
    JSON, JSON lines   objects; those with `config` and `summary` are runs of wandb's API (their
                       `config`, `summary`, `name`, `state`), nested keys become dotted names
    a directory        of such files

Invariant: a value is what the file says, and a run that says it has not finished is refused by
name. A chart doesn't say which runs have, and is thinned by wandb to 1,500 points or fewer a run.
"""

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from forescale.errors import UserError

SUFFIXES = (".csv", ".parquet", ".json", ".jsonl", ".ndjson")
FINISHED = "finished"
# wandb.apis.public.Run.state, and what a table of runs shows beside it.
_STATES = {FINISHED, "failed", "crashed", "killed", "running", "pending", "preempting", "preempted",
           "not found"}  # fmt: skip
_SEPARATOR = " - "  # of run and metric in a chart


@dataclass(frozen=True)
class Refused:
    """A run that is no record."""

    name: str
    why: str


@dataclass(frozen=True)
class Export:
    """A table as it was read, under the file's own names. name, state: which of its columns say so
    of a run; None: no column does, or the table is of no tracker that is known."""

    table: pd.DataFrame
    name: str | None = None
    state: str | None = None

    def of(self, table: pd.DataFrame) -> "Export":
        return replace(self, table=table)

    def refused(self, needed: Sequence[str]) -> dict[Any, Refused]:
        """By their place in the table: runs that have not finished, and those without a value in a
        column that is needed. Of a plain table, which knows neither names nor states, none."""
        if self.name is None:
            return {}
        found = {}
        for place, row in self.table.iterrows():
            if self.state and str(row[self.state]).lower() != FINISHED:
                found[place] = Refused(str(row[self.name]), f"wandb calls it {row[self.state]}")
            elif missing := [name for name in needed if pd.isna(row[name])]:
                found[place] = Refused(str(row[self.name]), f"it has no {', '.join(missing)}")
        return found


def is_export(path: Path) -> bool:
    """Whether it is for this file to read: a table's suffix, or a directory of dumped runs."""
    if not path.is_dir():
        return path.suffix in SUFFIXES
    try:
        return any(_is_run(one) for file in _files(path)[:1] for one in _objects(file))
    except (OSError, ValueError):
        return False


def read_export(path: Path) -> Export:
    """Any of the forms above. Raises UserError for what can't be read."""
    try:
        if path.is_dir() or path.suffix not in (".csv", ".parquet"):
            return _of_objects(path, [o for p in _files(path) or [path] for o in _objects(p)])
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "check the path") from None
    except (OSError, ValueError, ImportError) as e:
        what = f"can't be read as a table ({(str(e).splitlines() or [type(e).__name__])[0]})"
        todo = "give a CSV with a header, parquet, JSON lines, or a directory of JSON files"
        raise UserError(str(path), what, todo) from None
    if {"config", "summary", "name"} <= set(table.columns):  # the example in wandb's manual
        return _of_objects(path, [_spoken(path, row) for row in table.to_dict("records")])
    if metrics := _metrics(table):
        return _of_chart(table, metrics)
    return _of_runs_table(table)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl", ".ndjson"))


def _of_runs_table(table: pd.DataFrame) -> Export:
    """A row a run already, in capitals from the web page and in small letters from a script; and
    any other table."""
    for name, state in (("Name", "State"), ("name", "state")):
        if {name, state} <= set(table.columns):
            words = set(table[state].dropna().astype(str).str.lower())
            if words and words <= _STATES:
                return Export(table, name, state)
    return Export(table)


def _metrics(table: pd.DataFrame) -> list[str]:
    """Of a chart: its columns but the x-axis and the ends of bands; of any other table, none."""
    columns = [str(c) for c in table.columns]
    return [
        c for c in columns[1:] if _SEPARATOR in c and {f"{c}__MIN", f"{c}__MAX"} <= set(columns)
    ]


def _of_chart(table: pd.DataFrame, metrics: Sequence[str]) -> Export:
    """A row a run: the last value of each metric, and where on the x-axis the last one stands."""
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
    """Of a JSON file: an object, a list of them, or one a line."""
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
    """Runs of wandb's API, or plain rows."""
    objects = list(objects)
    of_wandb = list(map(_is_run, objects))
    if not any(of_wandb):
        return _of_runs_table(pd.json_normalize(objects))
    if not all(of_wandb):
        what = f"{of_wandb.count(False)} of its {len(objects)} objects have no config and summary"
        raise UserError(str(path), what, "leave them out")
    table = pd.DataFrame([_row(o) for o in objects])
    return Export(table, "name", "state" if "state" in table else None)


def _is_run(one: Mapping[str, Any]) -> bool:
    return "config" in one and _summary(one) is not None


def _summary(one: Mapping[str, Any]) -> Any:
    """By its name in the API, in its dumps, and in the service's own JSON."""
    names = ("summary", "summary_metrics", "summaryMetrics")
    return next((one[name] for name in names if name in one), None)


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    """Its name, state, config and summary. A key of the summary that the config has too is
    `summary.KEY`."""
    shown = ("display_name", "displayName", "name", "id")
    row = {"name": next((one[key] for key in shown if one.get(key)), "run")}
    row |= {key: one[key] for key in ("id", "state") if key in one}
    settings = {k: _bare(v) for k, v in _decoded(one["config"]).items() if not k.startswith("_")}
    row |= {f"config.{k}" if k in row else k: v for k, v in _dotted(settings)}
    for key, value in _dotted(_decoded(_summary(one))):
        row[f"summary.{key}" if key in row else key] = value
    return row


def _decoded(section: Any) -> dict[str, Any]:
    """The service gives sections as text."""
    return json.loads(section) if isinstance(section, str) else dict(section or {})


def _bare(value: Any) -> Any:
    """A setting as config.yaml has it: {desc, value}."""
    is_wrapped = isinstance(value, dict) and "value" in value and set(value) <= {"desc", "value"}
    return value["value"] if is_wrapped else value


def _dotted(section: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", _number(value)


def _number(value: Any) -> Any:
    """JSON knows no NaN and no infinity: wandb writes them as words."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


class _Numbers(ast.NodeTransformer):
    """nan and inf, which are no literals of Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("nan", "inf") else node


def _spoken(path: Path, row: dict[Any, Any]) -> dict[str, Any]:
    """Sections that were written as Python shows a dict."""
    try:
        trees = {name: ast.parse(row[name], mode="eval") for name in ("config", "summary")}
        return row | {k: ast.literal_eval(_Numbers().visit(tree)) for k, tree in trees.items()}
    except (SyntaxError, TypeError, ValueError):
        what = f"config and summary of {row['name']} are no dicts"
        raise UserError(str(path), what, "write them as Python or JSON does") from None
