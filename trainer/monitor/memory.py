"""The cache of views of runs: a second view reads only what has changed.

Invariant: the cache has what the files say now. Ledgers and tails follow their files; another file
is read again when its time, size or number has changed.
"""

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TypeVar

from forescale.monitor.follow import Tail
from forescale.monitor.ledger import Ledger, Steps
from forescale.run.directory import Attempt, Run
from forescale.run.rows import Row, read_rows

T = TypeVar("T")
Mark = tuple[str, int, int, int]
# Of each attempt; of the newest one, everything counts.
_FILES = ("", "parent.json", "metrics.jsonl", "events.jsonl", "launch.json", "heartbeat")


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
        """Return the events of an attempt. Raises UserError for a damaged row."""
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
        now = marks([path])
        if path not in self._read or self._read[path][0] != now:
            self._read[path] = now, read(path)
        return self._read[path][1]  # type: ignore[return-value]


def marks(paths: list[Path]) -> list[Mark]:
    """Return name, number, size and time of those of the files that exist."""
    values = []
    for path in paths:
        with suppress(OSError):
            stat = path.stat()
            values.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return values


def marks_of(run: Run) -> list[Mark]:
    """Return the marks of all files of a run's status; they differ after any change."""
    paths, attempts = [run.config, run.path / "attempts", run.checkpoints], run.attempts()
    for attempt in attempts:
        paths += [attempt.path / name for name in _FILES]
    for attempt in attempts[-1:]:
        paths += sorted(attempt.path.glob("*"))
    for step in run.checkpoint_steps():
        folder = run.checkpoint_path(step)
        paths += [folder, folder / "state.json"]
    return marks(paths)
