"""Prints the table of all runs, with the columns that fit.

Invariant: a run that can't be read is reported and doesn't hide the others. What is not shown is
not read: most columns need only the last rows of a run.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from forescale.ground.console import span, visible
from forescale.ground.errors import UserError
from forescale.monitor.index import Index, RunRow
from forescale.monitor.run_text import runs_now, state_of
from forescale.run.directory import Run

if TYPE_CHECKING:
    from forescale.slurm.queue import Job
    from forescale.slurm.queue_cache import EarlyEnd

_COLUMNS = (
    "run", "state", "attempt", "step", "done", "loss", "bits/byte", "tokens/s", "MFU", "ETTR",
    "ETA", "saved", "seen", "last event",
)  # fmt: skip
_LEFT = ("run", "state", "last event")  # aligned left
_BETWEEN = 2  # spaces between two columns
_LEAST_FIRST = ("last event", "attempt", "ETTR", "MFU", "seen", "done", "saved", "loss", "ETA")


def show_runs(
    runs: Sequence[Run],
    index: Index,
    console: Console,
    jobs: Mapping[str, "Job"],
    ends: Mapping[str, "EarlyEnd"],
) -> None:
    """Print a table of all runs, with the columns that fit. jobs: those in the queue, by the run's
    name; ends: those of which no rank began."""
    rows: list[tuple[float, Run, RunRow | UserError]] = []
    for run in runs:
        try:
            read = index.row(run, runs_now(jobs.get(run.name)))
            rows.append((read.last_seen, run, read))
        except UserError as e:  # one damaged run must not hide the others
            rows.append((index.statuses.of(run).last_seen, run, e))
    rows.sort(key=lambda each: -each[0])
    table, faults, now = [], [], time.time()
    for _, run, row in rows:
        job, end, name = jobs.get(run.name), ends.get(run.name), escape(run.name)
        if isinstance(row, UserError):
            table.append({"run": name, "state": "[red]unreadable[/]"})
            faults.append(str(row))
            continue
        cells = {column: escape(cell) for column, cell in row.cells.items()}
        cells |= {"run": name, "state": state_of(row.state, job, end)}
        cells["saved"] = f"{span(max(0.0, now - row.saved))} ago" if row.saved else "-"
        cells["seen"] = f"{span(max(0.0, now - row.last_seen))} ago"
        table.append(cells)
        if row.reason and job is None:
            faults.append(f"{run.name}: {row.reason}")
        if end and row.state != "complete":
            faults.append(f"{run.name}: {end.sentence} See forescale logs {run.name}")
    widths = _columns(table, console.width)
    for (_, run, row), cells in zip(rows, table, strict=True) if "ETTR" in widths else ():
        try:
            if isinstance(row, RunRow):
                index.add_ettr(run, row)
                cells["ETTR"] = row.cells["ETTR"]
        except UserError as e:
            faults.append(str(e))
    index.store()
    header = {name: f"[bold]{name}[/]" for name in widths}
    lines = (_line(cells, widths) for cells in (header, *table))
    console.print("\n".join(lines), no_wrap=True, overflow="ellipsis")
    for fault in faults:
        console.print(escape(fault), soft_wrap=True)


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    """Return a row of the table. (A table of rich takes a millisecond for it.)"""
    parts = []
    for name, width in widths.items():
        cell = cells.get(name, "-")
        if (blank := width - _wide(cell)) < 0:
            cell = cell[: width - 1] + "…"  # the name of a run
        parts.append(cell + " " * blank if name in _LEFT else " " * blank + cell)
    return (" " * _BETWEEN).join(parts)


def _wide(cell: str) -> int:
    """Return the columns that a cell takes on a terminal."""
    if cell.isascii() and cell.isprintable() and "[" not in cell and ":" not in cell:
        return len(cell)
    return Text.from_markup(visible(cell)).cell_len  # markup, emoji, control characters


def _columns(rows: Sequence[Mapping[str, str]], width: int) -> dict[str, int]:
    """Return the columns that fit, the most wanted ones, and how wide they are."""
    widths = {
        name: max(len(name), *(_wide(cells.get(name, "-")) for cells in rows)) for name in _COLUMNS
    }
    over = sum(widths.values()) + _BETWEEN * (len(widths) - 1) - width
    for name in _LEAST_FIRST:
        if over > 0:
            over -= widths.pop(name) + _BETWEEN
    widths["run"] -= min(max(over, 0), widths["run"] - len("run"))
    return widths
