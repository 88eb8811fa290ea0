"""`forescale stop`: a run saves and ends, wherever it runs; in a queue it isn't started again."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from forescale.config.compose import compose, overrides_of
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.errors import DONE, UserError
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import Submission, waiting_or_running


@dataclass
class StopJob(RunJob):
    VERB: ClassVar[str] = "stop"

    now: bool = key(False, "cancel at once, without saving; --now does the same")


JOB = StopJob
EXAMPLES = (
    "stop first",
    "stop first --now   (cancel, without saving)",
)


def main(words: list[str]) -> int:
    """Returns 0 when the run was asked; raises UserError where nothing of it runs."""
    words = ["now=true" if word == "--now" else word for word in words]
    job = compose(StopJob, overrides_of(StopJob, words))
    run = Run.existing(Path(job.target or "").expanduser(), Path(job.run.root).expanduser())
    found = waiting_or_running(run) if run.jobs() else None
    if found:
        _stop_job(*found, job.now)
    elif process := _launcher(run):
        _stop_launcher(process, job.now)
    else:
        todo = "see forescale status; another machine's processes can't be asked from here"
        raise UserError(str(run.path), "nothing of it runs here or waits in the queue", todo)
    return DONE


def _stop_job(submission: Submission, job: queue.Job, now: bool) -> None:
    submission.stop()  # first, so that no life of the job begins in between
    if now or job.is_waiting:
        queue.cancel(job.id)
        was = "waited in the queue" if job.is_waiting else "is cancelled without saving"
        print(f"Job {job.id} {was}; it is gone. forescale submit goes on with the run.")
        return
    queue.tell(job.id, "USR1")
    print(
        f"Job {job.id} was told to save and end; it isn't requeued. Follow: forescale logs "
        f"{submission.path.parents[1].name} rank=null"
    )


def _launcher(run: Run) -> psutil.Process | None:
    """The process on this machine that started the newest attempt, if it is alive."""
    for attempt in reversed(run.attempts()):
        told = launch_of(attempt.path)
        if told.get("host") == socket.gethostname() and "ended" not in told and "pid" in told:
            with suppress(psutil.Error):
                process = psutil.Process(told["pid"])
                # Its number may belong to another process by now.
                if process.create_time() <= told["begun"]:
                    return process
        if told:
            return None
    return None


def _stop_launcher(process: psutil.Process, now: bool) -> None:
    if now:
        process.kill()  # its ranks die with it
        print(f"Process {process.pid} is killed; what was not saved is lost.")
        return
    os.kill(process.pid, signal.SIGTERM)
    print(f"Process {process.pid} was told to save and end.")
