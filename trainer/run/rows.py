"""Rows of metrics and events: JSONL files, with one writer and one reader.

Invariant: a file has one writing process, and a row is one complete line. What a kill cut short at
the end of a file is no row: the step that it belonged to is in no checkpoint.
"""

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from forescale.storage import naming

Row = dict[str, Any]
_MOST_UNSYNCED = 16 << 20  # bytes of rows that are held in memory until they are durable
_NUMBERS = {"loss", "grad_norm", "loss_stderr", "bits_per_byte"}


class RowWriter:
    """Appends rows to a JSONL file. Several threads may add; each row is one whole line.

    After an error it may be used again: what a failed `add` left of its row is removed first, and
    after a failed `sync` the rows since the sync before are written again, because a system forgets
    what it couldn't write.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None
        self._lock, self._syncing = Lock(), Lock()
        self._end = self._synced = 0  # bytes: of whole rows; and of those that are durable
        self._since: list[bytes] = []  # the rows after `_synced`
        self._torn = self._doubtful = False  # an `add`, a `sync` has failed

    def add(self, row: Row) -> None:
        """Append a row. Raises OSError, with the file's name, if the storage refuses."""
        line = (to_json(row) + "\n").encode()
        with self._lock, naming(self.path):
            self._write(line)
            self._since.append(line)
            long = self._end - self._synced > _MOST_UNSYNCED
        if long:
            self.sync()

    def sync(self) -> None:
        """Make the added rows durable, so that they survive a failure of the machine. Raises
        OSError, with the file's name."""
        with self._syncing, naming(self.path):
            with self._lock:
                if self._file is None:
                    return
                if self._doubtful:
                    self._end, self._torn = self._synced, True  # cut off here before writing
                    self._write(b"".join(self._since))
                end, count = self._end, len(self._since)
                self._doubtful = True
            os.fsync(self._file.fileno())  # other threads may add meanwhile
            with self._lock:
                self._doubtful, self._synced = False, end
                del self._since[:count]

    def _write(self, lines: bytes) -> None:
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._end = self._synced = os.fstat(self._file.fileno()).st_size
        if self._torn:
            os.ftruncate(self._file.fileno(), self._end)
        self._torn, left = True, lines
        while left:  # a disk that fills up takes a part of the line first, then raises
            left = left[self._file.write(left) :]
        self._torn = False
        self._end += len(lines)


def read_rows(
    path: Path, *, after: int | None = None, until: int | None = None, **fields: Any
) -> list[Row]:
    """Return the rows of a file, filtered as by `select`; none if there is no file.

    Raises json.JSONDecodeError for a damaged line that isn't the last.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_parse(line) for line in lines if line]
    with suppress(json.JSONDecodeError):  # cut short by a kill
        rows += [_parse(last)] if last else []
    return select(rows, after=after, until=until, **fields)


def select(
    rows: Iterable[Row], *, after: int | None = None, until: int | None = None, **fields: Any
) -> list[Row]:
    """Return the rows whose `fields` have these values (kind="train", step=100).

    after, until: only rows of steps in (after, until]; a row without a step counts as step 0.
    """
    found = [row for row in rows if all(row.get(k) == v for k, v in fields.items())]
    if after is not None:
        found = [row for row in found if row.get("step", 0) > after]
    if until is not None:
        found = [row for row in found if row.get("step", 0) <= until]
    return found


class RowReader:
    """Reads the rows of a kind from a file that grows; each call goes on where the last ended."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind
        self._offset = 0

    def read(self) -> list[Row]:
        """Return the rows of the kind that were added since the last call."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as f:
            f.seek(self._offset)
            *lines, rest = f.read().split(b"\n")  # the rest is a row that is being written
            self._offset = f.tell() - len(rest)
        # Looked for as bytes first: a long run has a million rows of other kinds.
        mark = json.dumps(self.kind).encode()
        return select((_parse(line) for line in lines if mark in line), kind=self.kind)


def to_json(row: Row) -> str:
    """Return a row as JSON that every reader accepts: NaN and infinities become null. (An event
    records which of them it was.)"""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps({k: None if _is_not_finite(v) else v for k, v in row.items()})


def _parse(line: bytes) -> Row:
    """Return a row; numbers that were not finite are NaN again."""
    row = json.loads(line)
    for name, value in row.items():
        if value is None and (name in _NUMBERS or name.startswith("extra.")):
            row[name] = math.nan
    return row


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
