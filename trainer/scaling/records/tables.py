"""The records of a table: CSV, parquet, JSON or an export (exports.py), its columns mapped by name.

Invariant: a cell that can't be used is refused with its place; nothing is guessed or skipped.
Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forescale.config.schema import LARGEST, SMALLEST, shown
from forescale.config.suggest import nearest_first
from forescale.errors import UserError
from forescale.scaling.fitting.points import COLUMNS
from forescale.scaling.records.exports import Export, Refused, read_export
from forescale.scaling.records.records import KNOWN, NUMERIC


def of_export(
    path: Path, columns: Mapping[str, str], rows: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[Refused]]:
    """Return the records of a table, and the refusals.

    columns: {our name: name in the table}, beside the columns that have our names already; rows:
    {name in the table: value}, keeps only the rows with these values. Of an export (exports.py),
    runs that haven't finished or lack a mapped value are refused. Raises UserError if the file
    can't be read, if a column is missing, or if no row is left.
    """
    export = _only(path, read_export(path), rows or {})
    table = export.table
    _must_have(path, table, [*columns.values()])
    for ours in columns:
        if ours not in KNOWN:
            todo = f"use one of {', '.join(KNOWN)}"
            raise UserError(f"columns.{ours}", "is not a column of a record", todo)
    own = {name: name for name in KNOWN if name in table.columns and name not in columns}
    named = {} if "name" in own or "name" in columns or not export.name else {"name": export.name}
    chosen = {**named, **own, **columns}
    if "loss" not in chosen:
        near = ", ".join(map(repr, nearest_first("loss", map(str, table.columns))[:3]))
        todo = f"name it, such as columns={{loss: final_loss}}; the nearest are {near}"
        raise UserError(str(path), "has no column 'loss'", todo)
    refused = export.refused([theirs for ours, theirs in columns.items() if ours in COLUMNS])
    kept = table[~table.index.isin(refused)]
    if table.empty:
        raise UserError(str(path), "has no rows", "give a table with a row for each run")
    if kept.empty:
        why = next(iter(refused.values())).why
        problem = f"none of its {len(table)} runs is finished and has {', '.join(chosen)}"
        raise UserError(
            str(path), f"{problem}; of the first, {why}", "choose other rows or columns"
        )
    made = {o: _numbers(path, t, kept[t]) if o in NUMERIC else kept[t] for o, t in chosen.items()}
    return _expect_budgets(path, pd.DataFrame(made)), list(refused.values())


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
        raise UserError(where, f"{shown(cell)} is not a number that can be used", todo)
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
