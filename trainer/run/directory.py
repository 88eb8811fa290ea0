"""The run directory: its names, its attempts and their lineage. No other file knows these names.

    runs/<name>/
      config.yaml  run.json         the frozen config; identity (versions, data)
      tokenizer.json                a copy of the dataset's, so that the run can be used without it
      metrics.jsonl  events.jsonl   links to the newest attempt's, for people; not read here
      mirror.json                   what is copied elsewhere, see checkpoint/mirror.py
      imported.json                 of imported weights: the other files that came with them
      averaged.json                 of averaged weights: the run and the checkpoints they are of
      references.json               of preferences, see run/references.py
      chat.json                     the chat template of the conversations that it learns
      checkpoints/step-00001000/    published whole, see checkpoint/writer.py
      attempts/0003/                parent.json, metrics.jsonl, events.jsonl, trace/, logs of ranks
      jobs/0001/                    one for each submission to SLURM, see slurm/submission.py
      evaluations/0001/             the same for evaluations, see slurm/evaluations.py

Invariant: an attempt writes only inside its own directory, and a file has one writing process. So
an old attempt that wakes up while a newer one runs can't damage it. Which checkpoints are eligible,
and which attempt holds the history, is decided by lineage when they are read.
"""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from forescale.ground.errors import UserError
from forescale.ground.storage import (
    blocks_of,
    hash_file,
    read_typed,
    staged,
    write_checked_json,
    write_file,
)
from forescale.ground.typed import Count
from forescale.run.rows import Prefix, Row, RowReader, RowWriter, prefix_until, read_rows, select
from forescale.run.stored import (
    Identity,
    ImportedFiles,
    StoredAverage,
    StoredChat,
    StoredReferences,
)

GGUF = ".gguf"  # the suffix of files of llama.cpp
_PREFIX = "step-"
_STEP = re.compile(r"step-[0-9]{8,18}")
_NUMBER = re.compile(r"[0-9]{4,9}")
_METRICS, _EVENTS, _PARENT = "metrics.jsonl", "events.jsonl", "parent.json"


@dataclass(frozen=True)
class Parent:
    """The checkpoint that an attempt started from: step 0 and None at the beginning of a run.
    skipped: intervals [first, end) of samples that are skipped for good. rolled_back_from: the
    anomalous step, if a rollback began this attempt."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a later version may mean something by it

    step: Count
    checkpoint: str | None = None
    skipped: tuple[tuple[Count, Count], ...] = ()
    rolled_back_from: Count | None = None


class Run:
    """One training trajectory, with all its attempts."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.identity = self.path / "run.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.mirror = self.path / "mirror.json"
        self.imported = self.path / "imported.json"
        self.averaged = self.path / "averaged.json"
        self.references = self.path / "references.json"
        self.chat = self.path / "chat.json"
        self.small_files: dict[Path, type] = {
            self.imported: ImportedFiles,
            self.averaged: StoredAverage,
            self.references: StoredReferences,
            self.chat: StoredChat,
        }

    @property
    def metrics(self) -> Path:
        """The rows of the newest attempt that began to train: the run's history."""
        begun = self.begun()
        return (begun.path if begun else self.path) / _METRICS

    @property
    def events(self) -> Path:
        begun = self.begun()
        return (begun.path if begun else self.path) / _EVENTS

    @property
    def has_links(self) -> bool:
        """True if an attempt has ever begun to train here."""
        return os.path.lexists(self.path / _METRICS)

    @property
    def weights_alone(self) -> Literal["imported", "averaged"] | None:
        """Where the weights come from, of a run that holds nothing else for others to begin with;
        None if it is trained. Only a run of weights alone has a checkpoint of step 0."""
        if not self.checkpoint_path(0).is_dir():
            return None
        if self.averaged.is_file():  # first: the average of a run that began with imported weights
            return "averaged"
        return "imported" if self.imported.is_file() else None

    @property
    def is_import(self) -> bool:
        return self.weights_alone == "imported"

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def existing(cls, target: str | Path, root: str | Path = "runs") -> "Run":
        """Return the run at a path, or the one with a name under `root`. Raises UserError if there
        is none."""
        root, target = Path(root).expanduser(), Path(target).expanduser()
        for path in (target, root / target):
            if (path / "config.yaml").is_file():
                return cls(path)
        if is_hf(target):
            problem = "holds a Hugging Face model, and no run"
            raise UserError(str(target), problem, f"make one: forescale import hf {target} NAME")
        names = sorted(p.parent.name for p in root.glob("[!.]*/config.yaml"))
        known = f"the runs in {root} are: {', '.join(names)}" if names else "train one first"
        raise UserError(str(target), f"no run has this name or path (searched {root} too)", known)

    def read_identity(self) -> Identity:
        """Return the content of run.json. Raises UserError if it is missing or damaged."""
        return read_typed(Identity, self.identity)

    def read_imported(self) -> dict[str, Any]:
        """Return the content of imported.json, {} if there is none. Raises UserError if it is
        damaged."""
        return {**read_typed(ImportedFiles, self.imported)} if self.imported.is_file() else {}

    def verified_tokenizer(self) -> Path:
        """Return the path of tokenizer.json. Raises UserError if it isn't the one that run.json
        names."""
        path = self.tokenizer
        expected = self.read_identity().get("tokenizer_sha256")
        if expected is not None and path.is_file() and hash_file(path).sha256 != expected:
            problem = "was changed since it was written (run.json has another checksum)"
            raise UserError(str(path), problem, "restore it from the dataset")
        return path

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"{_PREFIX}{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all published checkpoints, ascending, eligible or not. Other names
        (`cp -r` of a checkpoint to step-00000083.bak) are no checkpoints."""
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        steps = {step_named(p.name) for p in paths if p.is_dir()}
        return sorted(step for step in steps if step is not None)

    def attempts(self) -> list["Attempt"]:
        """Return all attempts, oldest first."""
        return [Attempt(path) for path in _numbered(self.path / "attempts")]

    def begun(self) -> "Attempt | None":
        """Return the newest attempt that began to train."""
        return next((a for a in reversed(self.attempts()) if a.has_begun), None)

    def new_attempt(self) -> "Attempt":
        """Make the directory of the next attempt."""
        return Attempt(_next(self.path / "attempts"))

    def attempt_after(self, attempt: "Attempt") -> "Attempt":
        """Make the directory of the attempt that follows `attempt`. Raises UserError if there is
        one already: another launch has overtaken this one."""
        following = attempt.path.with_name(f"{attempt.number + 1:04d}")
        try:
            following.mkdir()
        except FileExistsError:
            self.expect_newest(attempt)
            raise
        return Attempt(following)

    def expect_newest(self, attempt: "Attempt") -> None:
        """Raise UserError if another launch has started an attempt after this one."""
        newest = self.attempts()[-1].number
        if newest > attempt.number:
            problem = f"attempt {newest} was started after this one, attempt {attempt.number}"
            raise UserError(str(self.path), problem, "do nothing: the newer attempt goes on")

    def jobs(self) -> list[Path]:
        """Return the directories of all submissions to SLURM, oldest first."""
        return _numbered(self.path / "jobs")

    def new_job(self) -> Path:
        return _next(self.path / "jobs")

    def new_evaluations(self) -> Path:
        return _next(self.path / "evaluations")

    def read_events(self, **fields: Any) -> list[Row]:
        """Return the events of all attempts, oldest attempt first; filters as in `read_rows`."""
        return [row for a in self.attempts() for row in read_rows(a.events.path, **fields)]

    def is_eligible(self, attempt: int, step: int) -> bool:
        """Return True if a checkpoint of `attempt` at `step` is on the current trajectory: no later
        attempt started before that step."""
        later = (a.parent for a in self.attempts() if a.number > attempt)
        return all(parent is None or step <= parent.step for parent in later)

    def is_evaluated(self, step: int) -> bool:
        """Return True if the rows hold the loss of `step` over all held-out text, or the events say
        that there is none. A step is saved before it is evaluated: a run that is killed in between
        isn't complete, and the next attempt evaluates first."""
        rows = RowReader(self.metrics, kind="validation").read()
        if select(rows, step=step, dataset="validation"):
            return True
        empty = self.read_events(kind="nothing_to_validate", step=step)
        return any(event.get("dataset", "validation") == "validation" for event in empty)

    def skipped(self) -> tuple[tuple[int, int], ...]:
        """Return all intervals of samples that some attempt skips for good. (A checkpoint that was
        saved earlier doesn't contain them.)"""
        parents = [a.parent for a in self.attempts()]
        return tuple(interval for p in parents if p for interval in p.skipped)

    def rollbacks(self) -> list[int]:
        """Return the anomalous steps that the run has rolled back from, oldest first."""
        parents = [a.parent for a in self.attempts()]
        return [p.rolled_back_from for p in parents if p and p.rolled_back_from is not None]

    def link(self) -> None:
        """Make the run's metrics.jsonl and events.jsonl links to those of the newest attempt that
        began to train."""
        linked = None
        while (newest := self.begun()) and newest != linked:  # again if one began meanwhile
            linked = newest
            for name in (_METRICS, _EVENTS):
                temporary = self.path / f".{name}.{newest.path.name}"
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(Path("attempts", newest.path.name, name))
                os.replace(temporary, self.path / name)


def expect_free(run: Run) -> None:
    """Raise UserError if there is something at the path of a new run."""
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise UserError(str(run.path), "exists already", "choose another name")


@contextmanager
def new_run(run: Run, mode: int, tag: str = "new") -> Iterator[Run]:
    """Yield a run in a stage directory, to be filled; after the block it appears as `run`, whole,
    by one rename, so that a kill or a full disk leaves no partial run. mode: of the directory; tag:
    see storage.staged. Raises UserError if something is there by then."""
    try:
        with staged(run.path.resolve(), tag) as stage:
            stage.chmod(mode)
            yield Run(stage)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not run.path.is_dir():
            raise
        problem = "another command has made this run at the same moment"
        todo = "give the same command again to resume it later, or choose another name"
        raise UserError(str(run.path), problem, todo) from None


def is_hf(path: Path) -> bool:
    """Return True for a directory that holds a Hugging Face model, and no run, and a GGUF file."""
    if path.suffix == GGUF:
        return path.is_file()
    return (path / "config.json").is_file() and not (path / "config.yaml").is_file()


def step_named(name: str) -> int | None:
    """Return the step in the name of a checkpoint's directory; None for other names."""
    step = int(name.removeprefix(_PREFIX)) if _STEP.fullmatch(name) else None
    return step if step is not None and name == f"{_PREFIX}{step:08d}" else None


def _numbered(root: Path) -> list[Path]:
    names = [p.name for p in root.iterdir() if _NUMBER.fullmatch(p.name)] if root.is_dir() else []
    return [root / name for name in sorted(names, key=int)]


def _next(root: Path) -> Path:
    """Make the directory with the next number. mkdir is exclusive: two launches never share one."""
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
    """One launch of all ranks, or its continuation after a rollback."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @cached_property
    def metrics(self) -> RowWriter:
        """Writer of one row per step and evaluation."""
        return RowWriter(self.path / _METRICS)

    @cached_property
    def events(self) -> RowWriter:
        return RowWriter(self.path / _EVENTS)

    @property
    def parent_path(self) -> Path:
        return self.path / _PARENT

    @property
    def has_begun(self) -> bool:
        """True if it began to train: then its rows hold the whole history."""
        return self.parent_path.exists()

    @property
    def parent(self) -> Parent | None:
        """The checkpoint it started from; None if it never began to train."""
        path = self.parent_path
        todo = "restore the file, or use the version that wrote the run"
        return read_typed(Parent, path, todo) if path.exists() else None

    def event(self, kind: str, **facts: Any) -> None:
        """Write an event: its kind, and facts by name."""
        self.events.add({"kind": kind, "attempt": self.number, "time": time.time(), **facts})

    def start_from(self, parent: Parent, run: Run, history: Prefix | None = None) -> None:
        """Record the parent, and begin metrics.jsonl with the rows of the run up to its step.
        history: those rows, if their file is known (history.py); else they are those of `run` now.
        An attempt that a newer one has overtaken changes nothing outside its directory."""
        if history is None:
            history = prefix_until(run.metrics, parent.step) if parent.step else None
        copied = blocks_of(history.path, history.size) if history and history.size else b""
        write_file(self.metrics.path, copied)
        self.events.path.touch()
        write_checked_json(self.parent_path, vars(parent))
        if run.attempts()[-1].number == self.number:
            run.link()
