"""Rows of metrics and events: JSONL files, with one writer and one reader.

Invariant: a file has one writing process, and a row is one complete line that carries its own
checksum (`crc`, which readers here verify and take out). What a kill cut short at the end of a file
is no row: the step that it belonged to is in no checkpoint.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NotRequired, Required

from typing_extensions import TypedDict

from forescale.ground.errors import UserError
from forescale.ground.foreign import SMALL, open_regular
from forescale.ground.storage import FileEntry, blocks_of, hash_file, naming
from forescale.ground.typed import AnyNumber, Count, Moment, Number, typed

Row = dict[str, Any]
_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"}$')
_NOTHING = hashlib.sha256().hexdigest()
_MOST_UNSYNCED = 16 << 20  # bytes of rows that are held in memory until they are durable
_LONGEST = SMALL  # bytes of a row
_NUMBERS = {"loss", "grad_norm", "loss_stderr", "bits_per_byte"}


class _AnyRow(TypedDict, total=False):
    """What several kinds of rows and events have."""

    kind: str
    step: Count
    attempt: Count
    time: Moment
    tokens: Count | None
    dataset: str
    reason: str


class _Scored(_AnyRow, total=False):
    step: Required[Count]  # type: ignore[misc]  # narrower
    loss: AnyNumber
    loss_stderr: AnyNumber
    bits_per_byte: AnyNumber
    windows: Count


class _Step(TypedDict):
    """A train row; of a damaged or early one, the parts that it has."""

    step: Count
    attempt: NotRequired[Count]
    loss: NotRequired[AnyNumber]
    tokens: NotRequired[Count]
    g0: NotRequired[Count]
    g1: NotRequired[Count]
    shares: NotRequired[dict[str, Count]]
    seconds: NotRequired[dict[str, Number]]
    mfu: NotRequired[AnyNumber | None]
    quarantined: NotRequired[list[tuple[str, Count, str]]]


class _Ended(_AnyRow, total=False):
    seconds: dict[str, Number]


class _Forecast(_AnyRow):
    forecast: str
    predicted: Number
    observed: AnyNumber | None
    interval: tuple[Number, Number]
    level: Number


class _Anew(_AnyRow):
    step: Count  # type: ignore[misc]  # narrower
    above: Number
    loss: Number
    low: Number
    high: Number
    inside: Number
    level: Number


class _Alarm(_AnyRow):
    step: Count  # type: ignore[misc]  # narrower
    since: Count
    beyond: Number
    reference: Count | None


_KINDS = {
    "train": _Step, "validation": _Scored, "ended": _Ended, "forecast_scored": _Forecast,
    "forecast_anew": _Anew, "forecast_left": _Alarm, "forecast_back": _Alarm,
}  # fmt: skip


@dataclass(frozen=True)
class Prefix:
    """The first `size` bytes of a file of rows, which end with a whole row."""

    path: Path
    size: int


class RowWriter:
    """Appends rows to a JSONL file. Several threads may add; each row is one whole line. After an
    error it may be used again: what a failed `add` left of its row is removed first, and after a
    failed `sync` the rows since the sync before are written again, because a system forgets what it
    couldn't write."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None
        self._lock, self._syncing = Lock(), Lock()
        self._end = self._synced = 0  # bytes: of whole rows; and of those that are durable
        self._since: list[bytes] = []  # the rows after `_synced`
        self._hash = hashlib.sha256()  # of the whole rows
        self._torn = self._doubtful = False  # an `add`, a `sync` has failed

    def add(self, row: Row) -> None:
        """Append a row. Raises OSError, with the file's name, if the storage refuses."""
        text = to_json(row).encode()
        line = b'%s, "crc": "%08x"}\n' % (text[:-1], zlib.crc32(text))
        with self._lock, naming(self.path):
            self._write(line)
            self._hash.update(line)
            self._since.append(line)
            long = self._end - self._synced > _MOST_UNSYNCED
        if long:
            self.sync()

    def state(self) -> FileEntry:
        """Return size and sha256 of the file as it is now. Cheap: they are kept while rows are
        added."""
        with self._lock, naming(self.path):
            if self._file is None:
                return hash_file(self.path) if self.path.exists() else FileEntry(0, _NOTHING)
            return FileEntry(self._end, self._hash.hexdigest())

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
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                raise UserError(str(self.path), "is no regular file to append to", "remove it")
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            for block in blocks_of(self.path):
                self._hash.update(block)
                self._end += len(block)
            self._synced = self._end
        if self._torn:
            os.ftruncate(self._file.fileno(), self._end)
        self._torn, left = True, lines
        while left:  # a disk that fills up takes a part of the line first, then raises
            left = left[self._file.write(left) :]
        self._torn = False
        self._end += len(lines)


def each_row(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[Row, int]]:
    """Yield each row of a file with the offset of its end; none if there is no file. begin, end:
    only whole rows within these bytes. Raises UserError for a damaged row; a last line without its
    end is none."""
    if not path.exists():
        return
    with naming(path), open_regular(path, buffered=True) as f:
        at = f.seek(max(0, begin - 1))
        if begin:
            at += len(f.readline(_LONGEST))  # ends the row before, or the one that is cut
        for number, line in enumerate(iter(partial(f.readline, _LONGEST), b""), 1):
            at += len(line)
            if end is not None and at > end:
                return
            if len(line) == _LONGEST:
                raise damaged(f"{path}, line {number:,}", ValueError("it doesn't end"))
            if not line.endswith(b"\n"):
                return  # cut short by a kill, or still being written
            if line == b"\n":
                continue
            try:
                row = parse_row(line[:-1])
            except (ValueError, RecursionError) as e:
                place = f"the row at byte {at - len(line):,}" if begin else f"line {number:,}"
                raise damaged(f"{path}, {place}", e) from None
            yield row, at


def read_rows(
    path: Path, *, after: int | None = None, until: int | None = None, **fields: Any
) -> list[Row]:
    """Return the rows of a file, filtered as by `select`; none if there is no file. Raises
    UserError for a damaged row; a last line without its end is none."""
    return select((row for row, _ in each_row(path)), after=after, until=until, **fields)


def prefix_until(path: Path, step: int) -> Prefix:
    """Return the rows of a file up to `step`: those before the first row of a later step."""
    end = 0
    for row, end_of_row in each_row(path):
        if row.get("step", 0) > step:
            break
        end = end_of_row
    return Prefix(path, end)


def select(
    rows: Iterable[Row], *, after: int | None = None, until: int | None = None, **fields: Any
) -> list[Row]:
    """Return the rows whose `fields` have these values (kind="train", step=100). after, until: only
    rows of steps in (after, until]; a row without a step counts as step 0."""
    selected = [row for row in rows if all(row.get(k) == v for k, v in fields.items())]
    if after is not None:
        selected = [row for row in selected if row.get("step", 0) > after]
    if until is not None:
        selected = [row for row in selected if row.get("step", 0) <= until]
    return selected


class RowReader:
    """Reads the rows of a kind from a file that grows; each call goes on where the last ended."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind
        self._offset = 0

    def read(self) -> list[Row]:
        """Return the rows of the kind that were added since the last call."""
        if not self.path.exists():
            return []
        with open_regular(self.path, buffered=True) as f:
            f.seek(self._offset)
            *lines, rest = f.read().split(b"\n")  # the rest is a row that is being written
            self._offset = f.tell() - len(rest)
        # Looked for as bytes first: a long run has a million rows of other kinds.
        mark = json.dumps(self.kind).encode()
        try:
            return select((parse_row(line) for line in lines if mark in line), kind=self.kind)
        except (ValueError, RecursionError) as e:
            raise damaged(str(self.path), e) from None


def to_json(row: Row) -> str:
    """Return a row as JSON that every reader accepts: NaN and infinities become null. (An event
    records which of them it was.)"""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        known = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        return json.dumps({**dict.fromkeys(row), **known})


def parse_row(line: bytes) -> Row:
    """Return a row; numbers that were not finite are NaN again. Raises ValueError if it is damaged,
    or one of its values is of another type than its kind has.
    (Lines of earlier versions carry no checksum.)"""
    if match := _CRC.search(line):
        line = line[: match.start()] + b"}"
        if zlib.crc32(line) != int(match[1], 16):
            raise ValueError("its checksum differs")
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    for name, value in row.items():
        if value is None and (name in _NUMBERS or name.startswith("extra.")):
            row[name] = math.nan
    kind = row.get("kind")
    try:
        typed(_KINDS.get(kind, _AnyRow) if isinstance(kind, str) else _AnyRow, row, "")
    except UserError as e:
        raise ValueError(e.problem.removeprefix("is damaged: ")) from None
    return row


def has_checksum(line: bytes) -> bool:
    """Return True if a line, without its end, carries the checksum of its row."""
    return line.endswith(b', "crc": "%08x"}' % zlib.crc32(b"}", zlib.crc32(line[:-20])))


def damaged(where: str, error: Exception) -> UserError:
    """Return the error of a row that `parse_row` refused."""
    reason = error if type(error) is ValueError else "not JSON"
    todo = "restore the file from a copy; or remove the line, to look at the others"
    return UserError(where, f"the row is damaged ({reason})", todo)
