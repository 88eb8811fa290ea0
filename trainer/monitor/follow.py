"""Followers of growing files of rows, for views of files with a million rows: each update reads
only the rows added since the last one. And what they know between two views.

Invariant: what a follower knows of a file is what a new one would find. A file that was replaced,
cut off or changed in place is read again from its beginning; of an old part that changes while the
file also grows, only the last row is compared. Sums are those of all rows, each of which was
verified.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self, TypeVar

from forescale.ground.foreign import SMALL, open_regular
from forescale.ground.storage import naming
from forescale.run.directory import Attempt, Run
from forescale.run.rows import Row, damaged, each_row, has_checksum, parse_row, read_rows

T = TypeVar("T")
Mark = tuple[str, int, int, int, int]
BLOCK = 1 << 17  # bytes that are read at once
TRAIN = b'{"kind": "train", '  # how the line of a step begins
RECENT = 20  # rows of a tail
_MOST = 64 << 20  # bytes in which the newest rows are looked for, before all are read
_COMPARED = 256  # bytes of the last row
_SCORE = b'"kind": "validation"'
_SECONDS = b'"seconds": {'
# Of each attempt; of the newest one, everything counts.
_FILES = ("", "parent.json", "metrics.jsonl", "events.jsonl", "launch.json", "heartbeat")


class Follower:
    """Reads the whole lines of a file, block by block; a subclass says what it makes of them. A
    damaged line raises UserError, now and at each later look."""

    def __init__(self, path: Path):
        self.path = path
        self._stamp: tuple[int, ...] = ()
        self._forget()

    def _forget(self) -> None:
        """Begin anew. Subclasses forget what they know."""
        self._file: tuple[int, ...] = ()
        self._offset, self._last = 0, b""  # the end of the lines that were read, and of the last

    def _begin(self, f: IO[bytes]) -> int:
        """Return the offset of the first line that is needed."""
        return 0

    def _take(self, lines: list[bytes]) -> None:
        """Take the next lines, all of which are sound."""
        raise NotImplementedError

    def update(self) -> Self:
        """Read what was added since the last call. Raises UserError for a damaged row."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._forget()
            self._stamp = ()
            return self
        stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if stamp != self._stamp:
            self._stamp = ()  # if a row is damaged, look again next time
            with naming(self.path), open_regular(self.path, buffered=True) as f:
                has_grown = stamp[:2] == self._file and stamp[2] > self._offset
                f.seek(self._offset - len(self._last) if has_grown else 0)
                if not (has_grown and f.read(len(self._last)) == self._last):
                    self._forget()
                    self._offset, self._file = self._begin(f), stamp[:2]
                self._read(f)
            self._stamp = stamp
        return self

    def _read(self, f: IO[bytes]) -> None:
        f.seek(self._offset)
        rest = b""  # of a line that the block cuts
        while block := f.read(BLOCK):
            block = rest + block
            if end := block.rfind(b"\n") + 1:
                lines = block[: end - 1].split(b"\n")
                self._expect_sound(lines)
                self._take(lines)
                self._offset += end
                self._last = block[max(0, end - _COMPARED) : end]
            if len(rest := block[end:]) > SMALL:
                raise damaged(str(self.path), ValueError("it doesn't end"))

    def _row(self, line: bytes) -> Row:
        """Return the row of a line whose checksum agrees. Raises UserError if a value of it is of
        another type."""
        try:
            return parse_row(line)
        except (ValueError, RecursionError) as e:
            raise damaged(str(self.path), e) from None

    def _expect_sound(self, lines: list[bytes]) -> None:
        """Raise UserError if a row is damaged. Only where the checksum differs, or an earlier
        version wrote none, a row is parsed for it."""
        for line in lines:
            if not has_checksum(line):
                try:
                    if line:
                        parse_row(line)
                except (ValueError, RecursionError) as e:
                    with open(self.path, "rb") as f:
                        number = next((n for n, each in enumerate(f, 1) if each[:-1] == line), 0)
                    raise damaged(f"{self.path}, line {number:,}", e) from None


def lines_of(kind: bytes, lines: list[bytes]) -> Iterator[bytes]:
    """Yield the lines of rows of a kind."""
    mark = b'"kind": "%s"' % kind
    return (line for line in lines if mark in line)


class Tail(Follower):
    """The last train rows and validation rows of a metrics.jsonl, RECENT of each at most; at least
    one validation row, if there is any. Rows before them are not read, nor verified."""

    def _forget(self) -> None:
        super()._forget()
        self._steps: deque[bytes] = deque(maxlen=RECENT)
        self._scores: deque[bytes] = deque(maxlen=RECENT)

    @property
    def steps(self) -> list[Row]:
        return [*map(self._row, self._steps)]

    @property
    def scores(self) -> list[Row]:
        return [*map(self._row, self._scores)]

    def _begin(self, f: IO[bytes]) -> int:
        end = f.seek(0, 2)
        size = 2 * BLOCK
        while size < end and size <= _MOST:
            f.seek(end - size)
            block = f.read(size)
            cut = block.find(b"\n") + 1  # the end of a row that is not whole
            if block.count(TRAIN, cut) >= RECENT and block.find(_SCORE, cut) >= 0:
                return end - size + cut
            size *= 4
        return 0

    def _take(self, lines: list[bytes]) -> None:
        self._steps.extend(lines_of(b"train", lines))
        self._scores.extend(lines_of(b"validation", lines))


@dataclass
class Steps:
    """The sums over the steps of one attempt. last: the newest step; first: seconds by phase of the
    oldest one; seconds: of all, by phase."""

    count: int = 0
    last: int = 0
    first: Mapping[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all of them, in all phases."""
        return sum(self.seconds.values())

    def without(self, later: "Steps | None") -> "Steps":
        """Return the steps that are not in `later`, the same attempt's steps in another file, or
        only its first ones; None: that file has none of them."""
        if later is None:
            return self
        if later.last >= self.last:
            return Steps()
        left = {k: max(0.0, v - later.seconds.get(k, 0.0)) for k, v in self.seconds.items()}
        return Steps(self.count - later.count, self.last, {}, left)


class Ledger(Follower):
    """The steps in a metrics.jsonl, by the number of the attempt that made them. attempt: only rows
    from the first one of this attempt on; the copied ones before it are skipped. longest: seconds
    of the longest step with its evaluation and save."""

    def __init__(self, path: Path, attempt: int | None = None):
        self.attempt = attempt
        super().__init__(path)

    def _forget(self) -> None:
        super()._forget()
        self.by_attempt: dict[int, Steps] = {}
        self.longest = 0.0

    def _begin(self, f: IO[bytes]) -> int:
        return 0 if self.attempt is None else first_of(self.path, self.attempt)

    def _take(self, lines: list[bytes]) -> None:
        trains = [line for line in lines if line.startswith(TRAIN)]
        others = [line for line in lines if not line.startswith(TRAIN)]
        if any(lines_of(b"train", others)) or not self._take_run(trains):
            for row in map(self._row, lines_of(b"train", lines)):
                seconds = row.get("seconds", {})
                self._add(row, 1, seconds, seconds, sum(seconds.values()))

    def _take_run(self, lines: Sequence[bytes]) -> bool:
        """Add consecutive steps of one attempt that have the same phases, without parsing each row.
        Return False, with nothing added, if they are anything else."""
        if not lines:
            return True
        first, last = self._row(lines[0]), self._row(lines[-1])
        names = list(first.get("seconds", ()))
        same = (first.get("attempt", 0), first["step"] + len(lines), names)
        ends = (last.get("attempt", 0), last["step"] + 1, list(last.get("seconds", ())))
        if same != ends or not names:
            return False
        # Only the numbers of `"seconds": {"data": 0.1, "compute": 0.2}` are left of each line.
        _, *parts = b"\n".join(lines).split(_SECONDS)
        text = b", ".join([part.partition(b"}")[0] for part in parts])
        for name in names:
            text = text.replace(json.dumps(name).encode() + b": ", b"")
        try:
            values = [*map(float, text.split(b", "))]
        except ValueError:  # other phases in between
            return False
        is_whole = len(parts) == len(lines) and len(values) == len(lines) * len(names)
        if not is_whole or not math.isfinite(sum(values)):
            return False
        sums = {name: sum(values[i :: len(names)]) for i, name in enumerate(names)}
        longest = 0.0
        if max(values) * len(names) > self.longest:  # else no step is longer
            longest = max(map(sum, zip(*[iter(values)] * len(names), strict=True)))
        self._add(last, len(lines), first["seconds"], sums, longest)
        return True

    def _add(
        self,
        last: Row,
        count: int,
        first: Mapping[str, float],
        seconds: Mapping[str, float],
        longest: float,
    ) -> None:
        steps = self.by_attempt.setdefault(last.get("attempt", 0), Steps(first=first))
        steps.count += count
        steps.last = last["step"]
        for phase, spent in seconds.items():
            steps.seconds[phase] = steps.seconds.get(phase, 0.0) + spent
        self.longest = max(self.longest, longest)


def first_of(path: Path, attempt: int) -> int:
    """Return the offset of the first row of an attempt, or of a later one; the file's end if there
    is none. Rows are in the order of attempts, so few are read. (Rows of other kinds than steps may
    not say of which attempt they are.)"""
    low, high = 0, path.stat().st_size
    while high - low > BLOCK:
        middle = (low + high) // 2
        rows = each_row(path, middle)
        row = next((each for each in rows if "attempt" in each[0]), None)
        if row is not None and row[0]["attempt"] < attempt:
            low = row[1]
        else:
            high = middle
    for later, end in each_row(path, low):
        if later.get("attempt", 0) >= attempt:
            break
        low = end
    return low


class Memory:
    """Ledgers and tails of files of rows, and the content of other files."""

    def __init__(self) -> None:
        self._ledgers: dict[Path, Ledger] = {}
        self._tails: dict[Path, Tail] = {}
        self._read: dict[Path, tuple[list[Mark], object]] = {}

    def ledger(self, path: Path, attempt: int | None = None) -> Ledger:
        """Return the ledger of a file, up to date. attempt: only the rows of this one are needed.
        Raises UserError for a damaged row."""
        ledger = self._ledgers.get(path)
        if ledger is None or (attempt is None and ledger.attempt is not None):
            ledger = self._ledgers[path] = Ledger(path, attempt)
        return ledger.update()

    def tail(self, path: Path) -> Tail:
        """Return the last rows of a file. Raises UserError if one is damaged."""
        return self._tails.setdefault(path, Tail(path)).update()

    def events(self, attempt: Attempt) -> list[Row]:
        return self.once(attempt.events.path, read_rows)

    def steps_of(self, attempt: Attempt, run: Run) -> Steps:
        """Return the steps that an attempt made itself, as they are now."""
        path = attempt.metrics.path
        ledger = self.ledger(path, None if path == run.metrics else attempt.number)
        return deepcopy(ledger.by_attempt.get(attempt.number, Steps()))

    def lost(self, attempt: Attempt, run: Run) -> Steps:
        """Return the steps that an attempt made, and that a later one did not start from."""
        later = self.ledger(run.metrics).by_attempt.get(attempt.number)
        return self.steps_of(attempt, run).without(later)

    def once(self, path: Path, read: Callable[[Path], T]) -> T:
        """Return `read(path)`, which is called again only if the file has changed since."""
        now = marks([str(path)])
        if path not in self._read or self._read[path][0] != now:
            self._read[path] = now, read(path)
        return self._read[path][1]  # type: ignore[return-value]


def marks(names: Iterable[str], folder: str = "") -> list[Mark]:
    """Return name, number, size and times (of the content; of any change, which nobody can set) of
    those of the files that exist."""
    values = []
    for name in names:
        with suppress(OSError):
            s = os.stat(folder + name)
            values.append((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return values


def marks_of(run: Run) -> list[Mark]:
    """Return the marks of all files of a run's status; they differ after any change."""
    folder = f"{run.path}{os.sep}"
    small = (run.config, run.identity, run.averaged, run.imported, run.checkpoints)
    names = [*(path.name for path in small), "attempts", "metrics.jsonl"]
    attempts = [f"attempts/{attempt.path.name}/" for attempt in run.attempts()]
    for attempt in attempts:
        names += [attempt + name for name in _FILES] + _in(folder, f"{attempt}heartbeat/")
    names += _in(folder, attempts[-1]) if attempts else []
    for checkpoint in map(run.checkpoint_path, run.checkpoint_steps()):
        names += [f"checkpoints/{checkpoint.name}{end}" for end in ("", "/state.json")]
    return marks(names, folder)


def _in(folder: str, name: str) -> list[str]:
    with suppress(OSError):
        return [name + each for each in sorted(os.listdir(folder + name))]
    return []
