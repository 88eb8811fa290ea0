"""A mirror of a run: its checkpoints and their history are copied elsewhere while it trains.

    checkpoint published -> files of the run -> files of the checkpoint -> its table, last

    ADDRESS/NAME/config.yaml run.json tokenizer.json ...
    ADDRESS/NAME/attempts/0003/metrics.jsonl ...
    ADDRESS/NAME/checkpoints/step-00001000/

Invariant: a copied checkpoint counts once its table is there, which is sent after every other file
was read back and had the sha256 of the table. Files of another trajectory are never replaced: a
folder with attempts that this run directory lacks is refused. Training never waits for the mirror,
nor fails because of it. Imports no torch.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from forescale.checkpoint.copies import LAUNCH, PARENT, Taken, expect_same_run
from forescale.checkpoint.retention import (
    CheckpointFacts,
    Keep,
    ValidationLosses,
    is_pinned,
    keep_of,
    reasons,
    survey,
)
from forescale.config.train import TrainJob
from forescale.ground.errors import Transient, UserError, masked, storage_error
from forescale.ground.storage import TABLE, FileEntry, read_table, write_json
from forescale.remote.buckets import Folder
from forescale.run.directory import Run, step_named

_LOOK = 5.0  # seconds between two looks for a new checkpoint
_PAUSE = 300.0  # most seconds between two tries while the other place fails
_AT_ONCE = 4  # files that are sent at a time
_SUFFIXES = {".json", ".jsonl", ".yaml", ".pin"}  # what else a run needs, by suffix


def folder_of(job: TrainJob) -> Folder | None:
    """Return where a job's run is mirrored, or None: `checkpoint.mirror` and the run's name."""
    if (address := job.checkpoint.mirror) is None:
        return None
    base = address if "://" in address else str(Path(address).expanduser())
    return Folder(f"{base.rstrip('/')}/{job.run.name}")


def mirror_of(run: Run, job: TrainJob, report: Callable[[str], object]) -> "Mirror | None":
    """Return the mirror of a run that a job asks for, or None."""
    folder = folder_of(job)
    return Mirror(run, folder, keep_of(job), report) if folder else None


class Mirror:
    """Copies one run to a folder, as its only writer.

    keep: the rule by which copies of deleted checkpoints are deleted, too; report: prints a line.
    """

    def __init__(self, run: Run, folder: Folder, keep: Keep, report: Callable[[str], object]):
        self._run, self._folder, self._keep, self._report = run, folder, keep, report
        self._there: dict[str, int] | None = None  # size by name
        self._attempts: set[str] = set()  # attempts that are known to be of this trajectory
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change, by name
        self._whole: dict[int, bytes] = {}  # the table of each checkpoint that is there, by step
        self._known: dict[int, int] = {}  # see `survey`
        self._noted: dict[str, Any] = {}  # what `status` was told last
        self._closing = threading.Event()
        self._lock = threading.Lock()

    def expect_same_run(self) -> None:
        """Raise Taken if the folder holds another run, or attempts that this run lacks; another
        UserError if it can't be listed, or is the run's own directory."""
        if self._there is None:
            if self._folder.is_at(self._run.path):
                todo = "set another checkpoint.mirror than the directory where runs are"
                raise UserError(self._folder.where, "is the run itself, not a copy of it", todo)
            there = self._folder.list()
            self._attempts = expect_same_run(self._run, self._folder, there)
            self._there = there

    def check(self) -> "Mirror":
        """Raise UserError if the folder is another run's, or can't be written to and read. A
        transient fault is only reported once the run has begun: it must not stop a resumed run."""
        try:
            self.expect_same_run()
            self._send(self._run.identity)
        except Transient as e:
            if not self._run.attempts():
                raise
            self._report(f"The mirror fails now, training goes on: {e}")
        return self

    def start(self) -> "Mirror":
        """Copy in a thread from now on, until `close`."""
        threading.Thread(target=self._work, name="mirror", daemon=True).start()
        return self

    def close(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Copy all missing files, until `stop` returns True, and end. That may take as long as a
        checkpoint; one that is sent in part stays incomplete, and doesn't count."""
        self._closing.set()
        last = threading.Thread(target=self._finish, name="mirror", daemon=True)
        last.start()
        while last.is_alive():
            last.join(0.1)
            if stop():
                self._report("The mirror is incomplete: the job is to end now.")
                return

    def _finish(self) -> None:
        if any(step not in self._whole for step in self._run.checkpoint_steps()):
            self._report(f"Copying the last checkpoint to {self._folder.where} ...")
        try:
            self.sync()
            self._send_run()  # the scores after the last checkpoint
        except Exception as e:
            why = _sentence(e)
            self._note(why)
            self._report(f"The mirror is incomplete, the run is not affected: {why}")
            return
        last = max(self._whole, default=None)
        if last is not None:
            self._report(f"Mirrored to {self._folder.where} up to step {last:,}.")

    def _work(self) -> None:
        reported, pause = "", _LOOK
        while not self._closing.wait(pause):
            try:
                self.sync()
                reported, pause = "", _LOOK
            except Exception as e:
                why = _sentence(e)
                self._note(why)
                if why != reported:
                    with suppress(OSError):  # such as a closed pipe
                        self._report(f"The mirror failed, training goes on: {why}")
                reported, pause = why, min(2 * pause, _PAUSE)
                if isinstance(e, Taken):
                    return

    def sync(self) -> None:
        """Copy new files, newest checkpoint first, and delete copies by the rule. Raises UserError,
        or OSError of the run's own storage; checkpoints that were sent whole by then count."""
        with self._lock:
            self.expect_same_run()
            done: set[int] = set()
            while left := set(self._run.checkpoint_steps()) - done:  # one may be saved meanwhile
                self._copy(max(left))
                done.add(max(left))
            for step in self._run.checkpoint_steps():  # pins that the run no longer has
                if not is_pinned(self._run, step):
                    self._remove(f"{self._name_of(step)}.pin")
            self._prune()
            self._note(None)

    def _note(self, error: str | None) -> None:
        """Write a list of the copies for `status`."""
        noted = {"where": self._folder.where, "steps": sorted(self._whole), "error": error}
        if noted != self._noted:
            with suppress(OSError, UserError):  # such as a full disk, of which the run itself tells
                write_json(self._run.mirror, noted)
                self._noted = noted

    def _copy(self, step: int) -> None:
        path = self._run.checkpoint_path(step)
        try:
            table = read_table(path)
            raw = (path / TABLE).read_bytes()
        except (UserError, OSError):
            return  # deleted meanwhile, or damaged: the audit tells of it
        if self._whole.get(step) == raw:
            return
        assert self._there is not None
        name = self._name(path)
        has_all = all(self._there.get(f"{name}/{f}") == e.size for f, e in table.items())
        is_whole = has_all and f"{name}/{TABLE}" in self._there
        if is_whole and b"".join(self._folder.get(f"{name}/{TABLE}")) == raw:
            self._whole[step] = raw  # this very checkpoint is there already
            return
        self._send_run()
        self._remove(f"{name}/{TABLE}")  # of an older checkpoint of this step
        self._whole.pop(step, None)
        self._known.pop(step, None)
        try:
            self._send_parts(path, table)
            sent = self._send(path / TABLE)
        except (UserError, OSError):
            if path.is_dir():
                raise
            return  # retention has deleted it
        if sent.sha256 != hashlib.sha256(raw).hexdigest():
            self._remove(f"{name}/{TABLE}")  # of a checkpoint that has just replaced this one
            return
        self._whole[step] = raw

    def _send_parts(self, checkpoint: Path, table: dict[str, FileEntry]) -> None:
        """Send the files of a checkpoint, some at a time, by daemon threads: with an executor an
        interrupted process would send all files before it exits."""
        left: SimpleQueue[tuple[str, FileEntry]] = SimpleQueue()
        for item in table.items():
            left.put(item)
        failed: list[Exception] = []

        def work() -> None:
            with suppress(Empty):
                while not failed:
                    name, entry = left.get_nowait()
                    try:
                        if self._send(checkpoint / name) != entry:
                            problem = "was changed since it was written (its sha256 differs from"
                            raise UserError(
                                str(checkpoint / name),
                                f"{problem} the table's)",
                                f"see forescale check {self._run.path}",
                            )
                    except Exception as e:
                        failed.append(e)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _send_run(self) -> None:
        """Send the files of the run that have changed: config, identity, history, pins."""
        attempts = self._run.attempts()
        for path in run_files(self._run):
            stat = path.stat()
            now, name = (stat.st_size, stat.st_mtime_ns), self._name(path)
            parts = name.split("/")
            if parts[0] == "attempts":
                if parts[1] not in self._attempts:  # it began since `expect_same_run`
                    begun = (f"attempts/{parts[1]}/{file}" for file in (LAUNCH, PARENT))
                    if any(map(self._folder.has, begun)):
                        run = self._run.name
                        problem = f"got attempt {parts[1]} of {run} from another copy of the run"
                        raise Taken(self._folder.where, problem, "stop one of them")
                    self._attempts.add(parts[1])
                is_newest = attempts[-1].path.name == parts[1]
                # Older attempts change no more. Their rows are long, and a new process of this
                # mirror would send them all again.
                if not is_newest and self._there and self._there.get(name) == now[0]:
                    continue
            if self._sent.get(name) != now:
                self._send(path)
                self._sent[name] = now

    def _send(self, path: Path) -> FileEntry:
        assert self._there is not None
        name = self._name(path)
        entry = self._folder.put(name, path)
        self._there[name] = entry.size
        return entry

    def _remove(self, name: str) -> None:
        assert self._there is not None
        if name in self._there:
            self._folder.remove(name)
            del self._there[name]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()

    def _name_of(self, step: int) -> str:
        return self._name(self._run.checkpoint_path(step))

    def _prune(self) -> None:
        """Delete copies of checkpoints that the run no longer has, by its rule; none that is newer
        than the newest complete copy of a checkpoint of the run."""
        assert self._there is not None
        gone = steps_in(self._there) - set(self._run.checkpoint_steps())
        if not gone:
            return
        losses = ValidationLosses(self._run.metrics)() if self._keep.best else {}
        local = survey(self._run, losses, known=self._known)
        lost = []
        for step in sorted(gone):
            name = self._name_of(step)
            # Pinned here or there: a purge of the run directory removes pins, too.
            pinned = is_pinned(self._run, step) or f"{name}.pin" in self._there
            is_whole = f"{name}/{TABLE}" in self._there
            lost.append(CheckpointFacts(step, 0, is_whole, pinned, losses.get(step)))
        stay = reasons([*local, *lost], self._keep)
        newest = max((f.step for f in local if f.step in self._whole), default=0)
        for step in sorted(s for s in gone if s not in stay and s < newest):
            name = self._name_of(step)
            self._remove(f"{name}/{TABLE}")  # first: what is left of it doesn't count
            self._folder.remove(name, recursive=True)
            self._there = {n: s for n, s in self._there.items() if not n.startswith(f"{name}/")}
            self._whole.pop(step, None)


def run_files(run: Run) -> Iterator[Path]:
    """Yield the files that a run needs beside its checkpoints to continue elsewhere: its own files,
    the rows and records of its attempts, and its pins."""
    for folder in (run.path, *(a.path for a in run.attempts()), run.checkpoints):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            is_named = path.suffix in _SUFFIXES and path.name[0] != "." and path != run.mirror
            if is_named and path.is_file() and not path.is_symlink():
                yield path


def _sentence(error: Exception) -> str:
    """Return the message of an error, which must not end the training, whatever it is."""
    known = (storage_error(error) if isinstance(error, OSError) else None) or error
    return (
        str(known) if isinstance(known, UserError) else masked(f"{type(error).__name__}: {error}")
    )


def steps_in(names: Iterable[str]) -> set[int]:
    """Return the steps of the checkpoints with at least one file in a mirror."""
    parts = (name.split("/") for name in names)
    steps = {step_named(p[1]) for p in parts if len(p) == 3 and p[0] == "checkpoints"}
    return {step for step in steps if step is not None}
