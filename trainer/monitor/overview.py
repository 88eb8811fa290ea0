"""The table of all runs, with the columns that fit; and the index of its rows, which one command
stores for the next.

    ~/.cache/forescale/runs-UID-HASH.json   mode 0600; HASH: of the path of the directory of runs

Invariant: a run that can't be read is reported and doesn't hide the others. What is not shown is
not read: most columns need only the last rows of a run. A stored row is the one that the run's
files would give now: its key is a digest of the number, size and times of every file that it was
read from; and it depends on neither the queue nor the clock, unless that goes back. (A node that
caches the attributes of files of a network sees a change that much later.) An index that is
damaged, another's or of another format is none.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from forescale.ground.console import span, visible
from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json
from forescale.ground.storage import cache_directory, read_private, write_private
from forescale.ground.typed import AnyNumber, typed
from forescale.monitor.follow import marks_of
from forescale.monitor.run_text import runs_now, state_of
from forescale.monitor.status import State, Status, Statuses
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


_FORMAT = 1  # raise it with every change of what a row or one of its cells holds
_TICK = 10e9  # nanoseconds: files of two changes within a tick of the file system can look alike


@dataclass
class RunRow:
    """What the table shows of a run. saved, last_seen: seconds since the epoch; at: when its files
    were read; cells: the text of the other columns, without ETTR until it is read."""

    state: State
    reason: str | None
    saved: AnyNumber | None
    last_seen: AnyNumber
    at: AnyNumber
    cells: dict[str, str]


@dataclass
class _Stored:
    format: Literal[1]
    rows: dict[str, RunRow]


class Index:
    """The rows of the runs in a directory, for one page or for a page that is redrawn."""

    def __init__(self, root: Path):
        self.root, self.statuses = root, Statuses()
        self._used: dict[str, RunRow] = {}  # by this page, and to be stored
        self._content = b""  # of the file

    @property
    def _path(self) -> Path:
        digest = hashlib.sha256(os.fsencode(os.path.abspath(self.root))).hexdigest()[:8]
        return cache_directory() / f"runs-{os.getuid()}-{digest}.json"

    @cached_property
    def _rows(self) -> dict[str, RunRow]:
        """The rows that an earlier page stored, by key."""
        with suppress(OSError, UserError, RuntimeError):  # a user without a home directory
            self._content = read_private(self._path)
            return typed(_Stored, parse_json(self._content, ""), "").rows
        return {}

    def row(self, run: Run, job_runs: bool) -> RunRow:
        """Return the row of a run. job_runs: SLURM says that a job of it runs. Raises UserError if
        the run can't be read."""
        marks = marks_of(run)  # before the files are read: of a later change, the key differs
        text = repr((run.name, marks)).encode(errors="surrogateescape")
        digest = hashlib.sha256(text).hexdigest()[:32]
        if not job_runs and (row := self._rows.get(digest)) and row.at <= time.time():
            self._used[digest] = row
            return row
        status = self.statuses.of(run, marks)
        status.job_runs = job_runs
        row = RunRow(
            status.state, status.reason, status.saved, status.last_seen, status.now, _cells(status)
        )
        newest = max(moment for mark in marks for moment in mark[3:])
        if row.state != "running" and not job_runs and newest < status.began * 1e9 - _TICK:
            self._used[digest] = row
        return row

    def add_ettr(self, run: Run, row: RunRow) -> None:
        """Add the ETTR of a run to its cells; all its rows are read for it. Raises UserError if one
        of them is damaged."""
        if "ETTR" not in row.cells:
            goodput = self.statuses.of(run).goodput
            row.cells["ETTR"] = f"{goodput.ettr:.2f}" if goodput.wall else "-"

    def store(self) -> None:
        """Store the rows of this page's runs, and begin the next page."""
        content = json.dumps({"format": _FORMAT, "rows": self._used}, default=vars).encode()
        if content != self._content:
            with suppress(OSError, RuntimeError):
                write_private(self._path, content)
        self._rows, self._used, self._content = self._used, {}, content


def _cells(s: Status) -> dict[str, str]:
    total, last = s.job.total_steps, s.validation
    steps = {"step": f"{s.step:,}/{total:,}", "done": f"{s.step / total:.1%}"}
    cells = {
        "attempt": str(s.attempts[-1].number) if s.attempts else "-",
        **({} if s.run.weights_alone else steps),
        "bits/byte": f"{last['bits_per_byte']:.4f}" if last and "bits_per_byte" in last else "-",
        "last event": (s.last_event or "-").replace("_", " "),
    }
    if s.last:
        mfu, rate, left = s.last.get("mfu"), s.tokens_per_second, s.seconds_left
        cells |= {
            "loss": f"{s.last.get('loss', math.nan):.4f}",
            "tokens/s": f"{rate:,.0f}" if rate else "-",
            "MFU": f"{mfu:.1%}" if mfu else "-",
            "ETA": span(left) if left else "-",
        }
    return cells


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
