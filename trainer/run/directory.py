"""The run directory: its names, its attempts and their lineage. The only file that knows them.

    runs/<name>/
      config.yaml  run.json         the frozen config; identity (versions, data)
      tokenizer.json                a copy of the dataset's, so that a run explains itself
      metrics.jsonl  events.jsonl   links to the newest attempt's
      checkpoints/step-00001000/    published whole, see checkpoint/writer.py
      attempts/0003/                parent.json, metrics.jsonl, events.jsonl, rank-0.log, trace/
      jobs/0001/                    one for each submission to SLURM, see slurm/submission.py

Invariant: an attempt writes only inside its own directory, and one process writes a file. So an old
attempt that wakes up while a newer one runs can't damage it; whether a checkpoint counts is judged
by lineage, when it is loaded.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from forescale.errors import UserError
from forescale.storage import naming, read_json, write_file, write_json

_PREFIX = "step-"
_NUMBERS = {"loss", "grad_norm", "loss_stderr", "bits_per_byte"}


@dataclass(frozen=True)
class Parent:
    """The checkpoint that an attempt started from; step 0 and no name where it started anew.

    skipped: samples that it passes over for good; ill: the step that the run rolled back from to
    begin this attempt, None for any other beginning.
    """

    step: int
    checkpoint: str | None = None
    skipped: tuple[tuple[int, int], ...] = ()
    ill: int | None = None

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Parent":
        """From JSON, which knows no tuples."""
        return cls(**{**stored, "skipped": tuple(map(tuple, stored.get("skipped", ())))})


class Run:
    """One training trajectory, however many attempts it took."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.identity = self.path / "run.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def existing(cls, target: str | Path, root: str | Path = "runs") -> "Run":
        """The run at a path, or of a name under `root`. Raises UserError where there is none."""
        for path in (Path(target), Path(root) / target):
            if (path / "config.yaml").is_file():
                return cls(path)
        names = sorted(p.parent.name for p in Path(root).glob("[!.]*/config.yaml"))
        known = f"the runs under {root} are: {', '.join(names)}" if names else "train one first"
        raise UserError(str(target), f"no run of this name or path (looked in {root} too)", known)

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"{_PREFIX}{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first, eligible or not."""
        paths = self.checkpoints.glob(f"{_PREFIX}*") if self.checkpoints.is_dir() else []
        return sorted(int(p.name.removeprefix(_PREFIX)) for p in paths if p.is_dir())

    def attempts(self) -> list["Attempt"]:
        """Oldest first."""
        return [Attempt(path) for path in _numbered(self.path / "attempts")]

    def new_attempt(self) -> "Attempt":
        return Attempt(_next(self.path / "attempts"))

    def jobs(self) -> list[Path]:
        """Of every time that it was submitted, oldest first."""
        return _numbered(self.path / "jobs")

    def new_job(self) -> Path:
        return _next(self.path / "jobs")

    def is_eligible(self, attempt: int, step: int) -> bool:
        """Whether a checkpoint of `attempt` at `step` lies on the trajectory that goes on: no later
        attempt started from before it."""
        later = (a.parent for a in self.attempts() if a.number > attempt)
        return all(parent is None or step <= parent.step for parent in later)

    def skipped(self) -> tuple[tuple[int, int], ...]:
        """Samples that some attempt has passed over for good: a checkpoint from before that
        doesn't know of them yet."""
        parents = [a.parent for a in self.attempts()]
        return tuple(interval for p in parents if p for interval in p.skipped)

    def rollbacks(self) -> list[int]:
        """The ill steps that the run has rolled back from, oldest first."""
        parents = [a.parent for a in self.attempts()]
        return [p.ill for p in parents if p and p.ill is not None]

    def point_to(self, attempt: "Attempt") -> None:
        """Make metrics.jsonl and events.jsonl stand for this attempt's."""
        for link in (self.metrics, self.events):
            temporary = link.with_name(f".{link.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(attempt.path.relative_to(self.path) / link.name)
            os.replace(temporary, link)


def _numbered(root: Path) -> list[Path]:
    names = sorted(p.name for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []
    return [root / name for name in names]


def _next(root: Path) -> Path:
    """Take the next number, by an exclusive mkdir: two launches never share one."""
    root.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in _numbered(root)), default=0)
    while True:
        number += 1
        try:
            (root / f"{number:04d}").mkdir()
        except FileExistsError:
            continue
        return root / f"{number:04d}"


@dataclass(frozen=True)
class Attempt:
    """One launch of all ranks. `number` is its directory's name."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @cached_property
    def metrics(self) -> "Rows":
        return Rows(self.path / "metrics.jsonl")

    @cached_property
    def events(self) -> "Rows":
        return Rows(self.path / "events.jsonl")

    @property
    def parent(self) -> Parent | None:
        """None for an attempt that never got as far as training."""
        path = self.path / "parent.json"
        return Parent.of(read_json(path)) if path.exists() else None

    def event(self, kind: str, **facts: Any) -> None:
        """Record that something happened which a reader of the run must know."""
        self.events.add({"kind": kind, "attempt": self.number, "time": time.time(), **facts})

    def start_from(self, parent: Parent, run: Run) -> None:
        """Fix the parent, and begin the rows with the valid history up to its step."""
        kept = [row for row in read_rows(run.metrics) if row.get("step", 0) <= parent.step]
        text = "".join(_strict(row) + "\n" for row in kept if parent.step)
        write_file(self.metrics.path, text.encode())
        self.events.path.touch()
        write_json(self.path / "parent.json", vars(parent))
        run.point_to(self)


class Rows:
    """A JSONL file with one writer, of which several threads may add. Each row is one write of a
    whole line."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None
        self._lock = Lock()

    def add(self, row: dict[str, Any]) -> None:
        line = (_strict(row) + "\n").encode()
        with self._lock, naming(self.path):
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            while line:  # a disk that fills up takes a part of it, and then none
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Make what was added durable, against a machine that goes down."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _strict(row: dict[str, Any]) -> str:
    """As JSON that every reader takes: it knows no NaN and no infinity, which become null (which of
    them it was, an event says)."""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps({k: None if _no_number(v) else v for k, v in row.items()})


def _read(line: bytes) -> dict[str, Any]:
    """A row, with the numbers that were none as NaN again."""
    row = json.loads(line)
    for name in _NUMBERS & row.keys():
        if row[name] is None:
            row[name] = math.nan
    return row


def _no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file. A last line that a kill cut short is
    left out: the step that it was for is not in any checkpoint."""
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_read(line) for line in lines if line]
    try:
        return rows + ([_read(last)] if last else [])
    except json.JSONDecodeError:
        return rows
