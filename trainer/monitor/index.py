"""The index of the table of runs: rows that one command stores for the next.

    ~/.cache/forescale/runs-UID-HASH.json   mode 0600; HASH: of the path of the directory of runs

Invariant: a stored row is the one that the run's files would give now. Its key is a digest of the
number, size and times of every file that it was read from; and it depends on neither the queue nor
the clock, unless that goes back. (A node that caches the attributes of files of a network sees a
change that much later.) An index that is damaged, another's or of another format is none.
"""

import hashlib
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from forescale.ground.console import span
from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json
from forescale.ground.storage import cache_directory, read_private, write_private
from forescale.ground.typed import AnyNumber, typed
from forescale.monitor.follow import marks_of
from forescale.monitor.status import State, Status, Statuses
from forescale.run.directory import Run

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
