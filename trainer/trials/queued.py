"""Runs of a trial in SLURM's queue, with the interface of the pool of this machine.

    runs to start -> campaigns/<name>/waves/NNNN.txt, one line a run -> one array, at_once at a time

Invariant: jobs outlive the command, and the same command follows those that are in the queue. A run
that no trial needs any longer is asked to save and end, and isn't requeued.
"""

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from forescale.ground.errors import CRASHED, UserError
from forescale.ground.storage import make_folder, write_file
from forescale.resilience.launcher import stop_signals_handled_by
from forescale.resilience.outcome import LaunchRecord, launch_of
from forescale.resilience.pool import EndedTraining
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import in_queue, newest, submissions
from forescale.slurm.submit import submit

_ASK = 15.0  # seconds between questions to the queue


class QueuePool:
    """The runs of a campaign in the queue. folder: of the campaign; options: of `forescale submit`,
    with slurm=PROFILE; log: gets a line when a stop signal comes."""

    def __init__(
        self, folder: Path, at_once: int, options: Sequence[str], log: Callable[[str], None]
    ):
        self.logs, self.at_once, self.options, self.log = folder / "logs", at_once, options, log
        self.stop_signal: int | None = None
        self._folder, self._stopped = folder, set[str]()
        self._new = dict[str, str]()  # words of runs not yet submitted
        self._known, self._asked = self._in_queue(), time.monotonic()

    def _in_queue(self) -> set[str]:
        runs = [Run(path) for path in (self._folder / "runs").glob("*")]
        return {s.run.path.name for s, _ in in_queue(s for run in runs for s in newest(run))}

    @property
    def running(self) -> list[str]:
        """The names of those that run, wait in the queue, or are to be submitted."""
        return [*self._known, *self._new] if self.stop_signal is None else []

    @property
    def has_room(self) -> bool:
        return len(self.running) < self.at_once and self.stop_signal is None

    def start(self, name: str, words: Sequence[str], *, folder: Path | None = None) -> None:
        """Let a run be submitted with the next array. Raises UserError for code of one's own, whose
        copy jobs of one array can't have each for itself."""
        if folder is not None:
            problem = "can't be set for a trial with code of your own"
            raise UserError("slurm", problem, "leave it out, and run the trial in a job of its own")
        self._stopped.discard(name)
        self._new[name] = shlex.join(word for word in words if not word.startswith("--"))

    def ended(self) -> list[EndedTraining]:
        """Submit what is new, and return the runs that have left the queue since the last call."""
        if self._new:
            self._submit()
        if time.monotonic() - self._asked < _ASK:
            return []
        before, self._known = self._known, self._in_queue()
        self._asked = time.monotonic()
        return [self._end(name) for name in sorted(before - self._known)]

    def _end(self, name: str) -> EndedTraining:
        attempts = reversed(Run(self._folder / "runs" / name).attempts())
        records = (launch_of(attempt.path) for attempt in attempts)
        record = next((one for one in records if one), LaunchRecord())
        code = record.get("code")
        return EndedTraining(name, CRASHED if code is None else code, record.get("how", ""))

    def _submit(self) -> None:
        folder = self._folder / "waves"
        make_folder(folder)
        path = folder / f"{len([*folder.glob('*.txt')]) + 1:04d}.txt"
        write_file(path, ("\n".join(self._new.values()) + "\n").encode())
        submit([*self.options, f"slurm.runs={path}", f"slurm.at_once={self.at_once}"])
        self._known |= self._new.keys()
        self._new = {}

    def stop(self, names: Iterable[str]) -> None:
        """Let some of them save and end, or leave the queue if they wait."""
        for name in [name for name in names if name not in self._stopped]:
            self._stopped.add(name)
            self._new.pop(name, None)
            run = Run(self._folder / "runs" / name)
            for submission, job in in_queue(submissions(run)[-1:]):
                submission.stop()
                if job.is_waiting:
                    queue.cancel(job.id)
                else:
                    queue.signal_batch(job.id, "USR1")

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Within the block, a stop signal ends the command and leaves the jobs in the queue."""
        with stop_signals_handled_by(self._on_signal):
            yield

    def _on_signal(self, number: int, frame) -> None:
        self.stop_signal = number
        self.log("The jobs stay in the queue. Give the same command again to follow them.")
